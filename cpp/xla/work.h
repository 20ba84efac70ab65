// Work on the engine on behalf of XLA.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "runtime/cpuinfer.h"
#include "runtime/function_task.h"

namespace ktmoe::xla {

// It refers to nothing of Python's.
class Work final : public FunctionTask {
 public:
  using FunctionTask::FunctionTask;
  bool ends_anywhere() const override { return true; }
};

// On the engine's threads and this one, after what was submitted before. It waits until the work is done,
// which may so refer to the caller's stack; only a caller within a task could not wait, and XLA is none.
inline void run(CPUInfer& engine, std::function<void()> work) {
  engine.wait(engine.submit(std::make_unique<Work>(std::move(work)), /*wake=*/false));
}

}  // namespace ktmoe::xla
