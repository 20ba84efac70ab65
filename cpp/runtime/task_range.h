// A range of task numbers that one worker eats from the front while others may take its back half.
#pragma once

#include <atomic>
#include <cstdint>

namespace ktmoe {

// Both ends are one 64-bit word, so every change is one compare-and-swap. The word says all there is to know:
// if it comes back to an earlier value, so does its meaning. It guards no data but itself, hence the relaxed
// order: what tasks read and write is ordered by the begin and the end of their job.
class TaskRange {
 public:
  void reset(uint32_t begin, uint32_t end) { word_.store(pack(begin, end), std::memory_order_relaxed); }

  uint32_t size() const {
    const uint64_t word = word_.load(std::memory_order_relaxed);
    return end_of(word) - begin_of(word);
  }

  // Takes the first task; false when there is none.
  bool pop_front(uint32_t& task) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    while (begin_of(word) != end_of(word)) {
      task = begin_of(word);
      if (replace(word, pack(task + 1, end_of(word)))) return true;
    }
    return false;
  }

  // Moves the back half, rounded up, into `thief`, which must be empty. Called only by the owner of `thief`.
  // False when there was nothing to move, or someone else was faster.
  bool move_back_half_to(TaskRange& thief) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    const uint32_t begin = begin_of(word), end = end_of(word);
    const uint32_t middle = begin + (end - begin) / 2;
    if (begin == end || !replace(word, pack(begin, middle))) return false;
    thief.reset(middle, end);
    return true;
  }

 private:
  static uint64_t pack(uint32_t begin, uint32_t end) { return static_cast<uint64_t>(end) << 32 | begin; }
  static uint32_t begin_of(uint64_t word) { return static_cast<uint32_t>(word); }
  static uint32_t end_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }

  bool replace(uint64_t& expected, uint64_t desired) {
    return word_.compare_exchange_weak(expected, desired, std::memory_order_relaxed);
  }

  std::atomic<uint64_t> word_{0};
};

}  // namespace ktmoe
