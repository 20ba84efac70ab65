// Tasks of Python in CUDA streams.
#pragma once

#include "bindings/convert/arrays.h"
#include "bindings/tasks/task.h"
#include "runtime/stream_session.h"

namespace ktmoe::bindings {

inline CudaDriver::Stream as_stream(uint64_t handle) { return reinterpret_cast<CudaDriver::Stream>(handle); }

// A Python task and its output array, which it keeps alive, or None.
StreamTask stream_task(PythonTask& task, nb::handle result);

// Destroys objects that streams and finished tasks no longer need; called with the GIL.
void release_done(CPUInfer& engine);

}  // namespace ktmoe::bindings
