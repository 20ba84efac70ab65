// Tasks on the engine on behalf of XLA.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "runtime/cpuinfer.h"
#include "runtime/function_task.h"
#include "runtime/run_in_turn.h"

namespace ktmoe::xla {

// It has no references to Python objects.
class HostTask final : public FunctionTask {
 public:
  using FunctionTask::FunctionTask;
  bool ends_anywhere() const override { return true; }
};

// work(0) to work(num - 1), one task each, on the engine's threads and this one, after what was submitted
// before. It waits until they are done, so they may refer to the caller's stack; only a caller within a task
// could not wait, and XLA is none.
inline void run(CPUInfer& engine, size_t num, FunctionRef<void(size_t)> work) {
  const auto make = [&](size_t i) { return std::make_unique<HostTask>([work, i] { work(i); }); };
  run_in_turn(engine, num, make, [&](const Ticket& ticket) { engine.wait(ticket); });
}
inline void run(CPUInfer& engine, FunctionRef<void()> work) {
  run(engine, 1, [&](size_t) { work(); });
}

}  // namespace ktmoe::xla
