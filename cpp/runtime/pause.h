// Waiting without sleeping: the processor's spin hint and the two ways in which the engine spins.
#pragma once

#include <sched.h>

#include <chrono>

namespace ktmoe {

// Tells the core that this is a spin loop: saves power and leaves the core to its other hyperthread.
inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  // `yield` does nothing on most Arm cores; `isb` stalls for about as long as x86's pause.
  asm volatile("isb" ::: "memory");
#endif
}

// Spins until `condition()` holds; false when it did not within `patience`.
template <class Condition>
bool spin_until(Condition condition, std::chrono::nanoseconds patience) {
  // Reading the clock takes about as long as one pause, so it is read once a round.
  constexpr int kPausesPerRound = 16;
  if (condition()) return true;
  if (patience <= std::chrono::nanoseconds::zero()) return false;
  const auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < kPausesPerRound; ++i) {
      cpu_pause();
      if (condition()) return true;
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Waits for something that another running thread is about to do: pauses first, and gives the CPU away once
// that takes long enough to suggest that the other thread has lost its own.
class Backoff {
 public:
  void wait() {
    if (num_pauses_ < kPausesBeforeYield) {
      ++num_pauses_;
      cpu_pause();
    } else {
      sched_yield();
    }
  }

 private:
  static constexpr int kPausesBeforeYield = 512;  // 10 to 25 us
  int num_pauses_ = 0;
};

}  // namespace ktmoe
