// A 32-bit word on which threads can sleep until it changes; no system call unless one does.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>

namespace ktmoe {

using Deadline = std::optional<std::chrono::steady_clock::time_point>;  // empty: none

// Why a wake-up is never lost: a sleeper first counts itself, then the kernel compares the word; a waker
// first changes the word, then looks at the count. All four are sequentially consistent, so one sees the
// other. There is no condition variable here because destroying one in a forked child waits for its lost
// waiters.
class Futex {
 public:
  uint32_t load() const { return word_.load(); }
  void store(uint32_t value) { word_.store(value); }
  void bump(uint32_t by = 1) { word_.fetch_add(by); }

  bool has_sleepers() const { return num_sleepers_.load() > 0; }

  // To be called after a change. Wakes up to `max_threads` sleepers.
  void wake(int max_threads) {
    if (max_threads > 0 && has_sleepers()) wake_sleepers(max_threads);
  }
  void wake_all();

  // Sleeps while the word is `seen`; may return early. False when the deadline has passed.
  bool sleep_while(uint32_t seen, const Deadline& deadline = {});

 private:
  void wake_sleepers(int max_threads);

  std::atomic<uint32_t> word_{0};
  std::atomic<int32_t> num_sleepers_{0};
};

}  // namespace ktmoe
