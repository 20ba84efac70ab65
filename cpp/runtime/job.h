// One parallel loop: what its tasks are, who runs them, and how it failed if it did.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>

#include "core/function_ref.h"
#include "runtime/inside_task.h"

namespace ktmoe {

// Called as fn(worker, sub-pool of the task, number of the task).
using TaskFn = FunctionRef<void(const Worker&, int subpool, uint32_t task)>;

// Tasks are numbered through over all sub-pools while they are dealt out and stolen; sub-pool s owns the
// numbers from first_task[s] up to first_task[s + 1].
class Job {
 public:
  enum class Numbering { kThroughout, kPerSubpool };  // of the tasks, as `fn` sees it

  Job(TaskFn fn, std::span<const uint32_t> first_task, Numbering numbering)
      : fn_(fn), first_task_(first_task), numbering_(numbering) {}

  void run(const Worker& worker, uint32_t task) noexcept {
    const size_t subpool = subpool_of(task);
    const uint32_t offset = numbering_ == Numbering::kPerSubpool ? first_task_[subpool] : 0;
    try {
      fn_(worker, static_cast<int>(subpool), task - offset);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  // Once true, the tasks not yet begun are skipped.
  bool failed() const { return failed_.load(std::memory_order_relaxed); }

  // For the thread that began the job, when every worker has left it.
  void rethrow_if_failed() const {
    if (failed()) std::rethrow_exception(error_);
  }

 private:
  size_t subpool_of(uint32_t task) const {
    size_t subpool = 0;
    while (task >= first_task_[subpool + 1]) ++subpool;
    return subpool;
  }

  TaskFn fn_;
  std::span<const uint32_t> first_task_;
  Numbering numbering_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace ktmoe
