// What this machine can do at most, measured: the yardstick of every bench.
#pragma once

#include "kernels/contract.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

struct MachineLimits {
  double read_bytes_per_s = 0;  // all threads streaming from memory
  double dot_flop_per_s = 0;    // products in registers (or tiles)
  double step_flop_per_s = 0;   // the same with the loads of a kernel's step, from the first-level cache
};

// Measures for about `seconds` each, on all threads of the pool at once. Products are of bf16 or of int8.
MachineLimits measure_limits(WorkerPool& pool, const kernels::KernelTable& table, double seconds,
                             bool is_integer);

}  // namespace ktmoe
