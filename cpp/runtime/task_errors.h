// The unreported exceptions of finished tasks, for callers that wait for all tasks. Owners of a task's ticket
// do not depend on them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

namespace ktmoe {

class TaskErrors {
 public:
  TaskErrors() { errors_.reserve(kMaxKept); }

  // For the thread that runs the tasks; tickets ascend. Needs no memory, since it must not fail.
  void add(uint64_t ticket, std::exception_ptr error) noexcept;

  // Who waited for this task has been told.
  void forget(uint64_t ticket);

  // The exception with the lowest ticket up to `last`, or null. All others up to `last` are forgotten.
  std::exception_ptr take_first_through(uint64_t last);

 private:
  struct Entry {
    uint64_t ticket;
    std::exception_ptr error;
  };

  // Bounded, since errors may never be collected. The oldest are kept, because sync() reports the first one,
  // and the newest, so that a later sync() still reports a failure.
  static constexpr size_t kMaxKept = 1024;

  std::vector<Entry>::iterator first_from(uint64_t ticket);

  std::atomic<size_t> num_kept_{0};  // spares the usual case the lock
  std::mutex mutex_;
  std::vector<Entry> errors_;  // ascending
};

}  // namespace ktmoe
