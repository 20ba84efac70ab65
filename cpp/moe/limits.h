// The measured limits of this machine, which every bench is compared with.
#pragma once

#include "kernels/contract.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

struct MachineLimits {
  double read_bytes_per_s = 0;  // all threads streaming from memory
  double dot_flop_per_s = 0;    // products in registers (or tiles)
  double step_flop_per_s = 0;   // the same with the loads of a kernel's step, from L1
};

// Measures for about `seconds` each, on all threads of the pool at once. Products are bf16 or int8.
MachineLimits measure_limits(WorkerPool& pool, const kernels::KernelTable& table, double seconds,
                             bool is_integer);

}  // namespace ktmoe
