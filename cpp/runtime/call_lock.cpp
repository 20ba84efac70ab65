#include "runtime/call_lock.h"

#include "runtime/fork_guard.h"

namespace ktmoe {
namespace {

// Threads are numbered, not known by an address or an id of the system, which are used again.
uint32_t this_thread() {
  static std::atomic<uint32_t> last{0};
  thread_local const uint32_t number = ++last;
  return number;
}

uint64_t this_owner() { return uint64_t{num_forks()} << 32 | this_thread(); }

uint32_t thread_of(uint64_t owner) { return static_cast<uint32_t>(owner); }

bool is_of_parent(uint64_t owner) { return owner >> 32 != num_forks(); }

}  // namespace

// The thread that forked keeps its locks in the child; other threads of the parent do not exist there.
CallLock::Outcome CallLock::try_take() {
  uint64_t owner = owner_.load();
  while (true) {
    if (thread_of(owner) == this_thread()) return Outcome::kHeldByThisThread;
    if (owner != 0 && !is_of_parent(owner)) return Outcome::kTimedOut;
    if (owner_.compare_exchange_weak(owner, this_owner())) return Outcome::kTaken;
  }
}

CallLock::Outcome CallLock::take(const Deadline& deadline) {
  while (true) {
    const uint32_t seen = released_.load();
    const Outcome outcome = try_take();
    if (outcome != Outcome::kTimedOut) return outcome;
    if (!released_.sleep_while(seen, deadline)) return try_take();
  }
}

void CallLock::release() {
  if (thread_of(owner_.load()) != this_thread()) return;  // taken over by another thread of a child
  owner_.store(0);
  released_.bump();
  released_.wake(1);
}

}  // namespace ktmoe
