// The calls of CUDA streams that this process has asked for.
#pragma once

#include "bindings/convert/arrays.h"
#include "bindings/tasks/task.h"
#include "runtime/stream_session.h"

namespace ktmoe::bindings {

// What they hold is Python's: to be settled with the GIL.
StreamCalls& stream_calls();

inline CudaDriver::Stream as_stream(uint64_t handle) { return reinterpret_cast<CudaDriver::Stream>(handle); }

// A task of Python's, and the array that it writes and so holds, or None.
StreamTask stream_task(PythonTask& task, nb::handle result);

// Lets go of what is done, of the engine's tasks too.
void settle(CPUInfer& engine);

}  // namespace ktmoe::bindings
