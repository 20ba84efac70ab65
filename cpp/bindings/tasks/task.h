// A unit of work in Python: created by a layer, submitted to an engine once.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "bindings/convert/arrays.h"
#include "core/error.h"
#include "runtime/function_task.h"

namespace ktmoe::bindings {

// Its task keeps the objects of the work alive until a thread with the GIL destroys it. A task that is never
// submitted may be part of a reference cycle through one of its arrays; the collector finds and breaks it.
class PythonTask {
 public:
  // The work is the only other owner of `arrays`.
  explicit PythonTask(std::function<void()> work, std::shared_ptr<const Arrays> arrays = nullptr)
      : task_(std::make_unique<FunctionTask>(std::move(work))), arrays_(std::move(arrays)) {}

  // ValueError when it was submitted before.
  std::unique_ptr<Task> take() {
    if (task_ == nullptr) throw_invalid("task: was submitted before, expected a new one for every submit");
    arrays_.reset();
    return std::move(task_);
  }

  static PyType_Slot slots[];  // for the cycle collector

 private:
  static int traverse(PyObject* self, visitproc visit, void* arg);
  static int clear(PyObject* self);

  std::unique_ptr<FunctionTask> task_;
  std::shared_ptr<const Arrays> arrays_;
};

}  // namespace ktmoe::bindings
