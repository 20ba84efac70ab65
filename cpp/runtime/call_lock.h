// A lock for code that signal handlers may re-enter and that forks may interrupt.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime/futex.h"

namespace ktmoe {

// A mutex can neither tell a thread that it holds it already, nor is it of use in a forked child when a
// thread of the parent held it. This one knows its owner: the thread, and the process. An owner of a parent
// process does not exist, so in the child the lock is free.
class CallLock {
 public:
  enum class Outcome { kTaken, kTimedOut, kHeldByThisThread };

  // Waits until the deadline; does not wait at all for a lock that the calling thread holds.
  Outcome take(const Deadline& deadline);
  Outcome try_take();

  // By the thread that took it.
  void release();

 private:
  std::atomic<uint64_t> owner_{0};  // 0 when free
  Futex released_;                  // changes with every release
};

}  // namespace ktmoe
