// A task that is a function.
#pragma once

#include <functional>
#include <utility>

#include "runtime/task_queue.h"

namespace ktmoe {

class FunctionTask : public Task {
 public:
  explicit FunctionTask(std::function<void()> work) : work_(std::move(work)) {}
  void run() override { work_(); }

 private:
  std::function<void()> work_;
};

}  // namespace ktmoe
