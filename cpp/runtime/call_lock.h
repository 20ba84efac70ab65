// A lock for code that signal handlers may re-enter and that forks may interrupt.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime/futex.h"

namespace ktmoe {

// A mutex cannot tell a thread that it already owns it, and is unusable in a forked child if a thread of the
// parent had locked it. This lock knows its owner: the thread and the process. In a child an owner in the
// parent process does not exist, so the lock is free.
class CallLock {
 public:
  enum class Outcome { kTaken, kTimedOut, kHeldByThisThread };

  // Waits until the deadline; does not wait for a lock that the calling thread owns.
  Outcome take(const Deadline& deadline);
  Outcome try_take();

  // By the thread that took it.
  void release();

 private:
  std::atomic<uint64_t> owner_{0};  // 0 when free
  Futex released_;                  // changes with every release
};

}  // namespace ktmoe
