// Common to the tests of the engine: tasks made of lambdas, a task that waits for its release, a small
// engine.
#pragma once

#include <memory>
#include <utility>

#include "runtime/cpuinfer.h"
#include "runtime_helpers.h"

namespace ktmoe::test {

class LambdaTask : public Task {
 public:
  explicit LambdaTask(std::function<void()> action) : action_(std::move(action)) {}
  void run() override { action_(); }

 private:
  std::function<void()> action_;
};

inline std::unique_ptr<Task> task(std::function<void()> action) {
  return std::make_unique<LambdaTask>(std::move(action));
}

inline std::unique_ptr<Task> failing(const std::string& message) {
  return task([message] { throw std::runtime_error(message); });
}

inline constexpr bool kNoWake = false;

// A task that begins when it is run and ends when it is released.
class Gate {
 public:
  std::unique_ptr<Task> task() {
    return test::task([this] {
      begun_ = true;
      becomes_true([this] { return open_.load(); });
    });
  }
  bool wait_until_begun() {
    return becomes_true([this] { return begun_.load(); });
  }
  void open() { open_ = true; }

 private:
  std::atomic<bool> begun_{false}, open_{false};
};

struct Engine : CPUInfer {
  explicit Engine(const std::vector<int>& thread_counts = {2}) : CPUInfer(subpools(thread_counts)) {}
};

inline std::string sync_error(CPUInfer& engine, uint64_t allow_n_pending = 0) {
  return message_of<std::runtime_error>([&] { engine.sync(allow_n_pending); });
}

inline std::string wait_error(CPUInfer& engine, const Ticket& ticket) {
  return message_of<std::runtime_error>([&] { engine.wait(ticket); });
}

inline const std::string kNoError = "(no exception)";

}  // namespace ktmoe::test
