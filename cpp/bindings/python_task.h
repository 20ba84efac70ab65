// A unit of work as Python holds it: made by a layer, handed to an engine once.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "bindings/arrays.h"
#include "core/error.h"
#include "runtime/function_task.h"

namespace ktmoe::bindings {

// Its task holds what the work refers to until a thread with the GIL destroys it.
class PythonTask {
 public:
  explicit PythonTask(std::function<void()> work) : task_(std::make_unique<FunctionTask>(std::move(work))) {}

  // ValueError when it was submitted before.
  std::unique_ptr<Task> take() {
    if (task_ == nullptr) throw_invalid("task: was submitted before, expected a new one for every submit");
    return std::move(task_);
  }

 private:
  std::unique_ptr<FunctionTask> task_;
};

}  // namespace ktmoe::bindings
