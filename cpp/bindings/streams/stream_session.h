// Tasks of Python in CUDA streams.
#pragma once

#include "bindings/convert/arrays.h"
#include "bindings/tasks/task.h"
#include "runtime/stream_session.h"

namespace ktmoe::bindings {

inline CudaDriver::Stream as_stream(uint64_t handle) { return reinterpret_cast<CudaDriver::Stream>(handle); }

// A task of Python's, and the array that it writes and so holds, or None.
StreamTask stream_task(PythonTask& task, nb::handle result);

// Destroys what streams and the engine's tasks have done with; the GIL is held.
void release_done(CPUInfer& engine);

}  // namespace ktmoe::bindings
