// Timelines of an engine in Python: the tasks that begin and end one, and what it has recorded.
#pragma once

#include <memory>

#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "runtime/cpuinfer.h"

namespace ktmoe::bindings {

PythonTask begin_trace_task(const CPUInfer& engine);

// What the task has ended, null if nothing was recorded.
using EndedTrace = std::shared_ptr<std::shared_ptr<const TaskTrace>>;
PythonTask end_trace_task(const CPUInfer& engine, const EndedTrace& ended);

// A RecordedTrace; throws std::runtime_error for null.
nb::object recorded_trace(const std::shared_ptr<const TaskTrace>& trace);

void bind_recorded_trace(nb::module_& m);

}  // namespace ktmoe::bindings
