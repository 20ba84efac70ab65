// The system calls behind Futex.
#include "runtime/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <ctime>

namespace ktmoe {
namespace {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t) && std::atomic<uint32_t>::is_always_lock_free,
              "the kernel reads the word itself");

// The kernel's CLOCK_MONOTONIC is what steady_clock counts on Linux.
timespec to_timespec(std::chrono::steady_clock::time_point time) {
  const auto since_boot = time.time_since_epoch();
  const auto seconds = std::chrono::floor<std::chrono::seconds>(since_boot);
  timespec result{};
  result.tv_sec = static_cast<time_t>(seconds.count());
  result.tv_nsec = static_cast<long>(std::chrono::nanoseconds(since_boot - seconds).count());
  return result;
}

}  // namespace

bool Futex::sleep_while(uint32_t seen, const Deadline& deadline) {
  timespec end{};
  if (deadline) end = to_timespec(*deadline);
  num_sleepers_.fetch_add(1);
  // The bitset variant is the one that takes an absolute time.
  const long result = syscall(SYS_futex, &word_, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, seen,
                              deadline ? &end : nullptr, nullptr, FUTEX_BITSET_MATCH_ANY);
  const bool timed_out = result != 0 && errno == ETIMEDOUT;
  num_sleepers_.fetch_sub(1);
  return !timed_out;
}

void Futex::wake_all() { wake(INT_MAX); }

void Futex::wake_sleepers(int max_threads) {
  syscall(SYS_futex, &word_, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, max_threads, nullptr, nullptr, 0);
}

}  // namespace ktmoe
