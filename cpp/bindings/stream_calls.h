// The calls of CUDA streams that this process has asked for.
#pragma once

#include "runtime/stream_calls.h"

namespace ktmoe::bindings {

// What they hold is Python's: to be settled with the GIL.
StreamCalls& stream_calls();

inline CudaDriver::Stream as_stream(uint64_t handle) { return reinterpret_cast<CudaDriver::Stream>(handle); }

}  // namespace ktmoe::bindings
