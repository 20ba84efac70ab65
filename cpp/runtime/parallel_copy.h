// Copying by all threads of a pool.
#pragma once

#include <cstddef>

#include "runtime/worker_pool.h"

namespace ktmoe {

// Copies `bytes` bytes, which do not overlap, in chunks. Writing to fresh memory on one thread is slow: every
// page of it faults.
void parallel_copy(WorkerPool& pool, const std::byte* from, std::byte* to, size_t bytes);

}  // namespace ktmoe
