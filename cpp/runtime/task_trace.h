// A timeline of an engine: which worker computed what, from when to when.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace ktmoe {

// Every worker appends to a track of its own, so recording takes no lock; phases, which surround the tasks
// of all workers, have a track with one. Tracks have fixed capacities: spans beyond them are counted, not
// kept.
class TaskTrace {
 public:
  static constexpr uint32_t kPhase = UINT32_MAX;  // in place of a worker

  struct Span {
    const char* name = "";  // of static storage
    int64_t layer = 0;
    uint32_t worker = kPhase;
    uint32_t task = 0;
    int64_t begin_ns = 0, end_ns = 0;  // of a steady clock
  };

  explicit TaskTrace(int num_workers, size_t most_spans = size_t{1} << 17);

  // From the worker's own thread, or, of a phase, from any.
  void add(const Span& span) noexcept;

  // While nothing is added: all spans, phases first, then by worker, in the order in which they ended.
  std::vector<Span> spans() const;
  uint64_t num_dropped() const;

  static int64_t now_ns() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

 private:
  struct alignas(128) Track {
    std::vector<Span> spans;
    uint64_t dropped = 0;
  };

  static void append(Track& track, const Span& span) noexcept;

  std::mutex phases_mutex_;
  std::vector<Track> tracks_;  // that of phases first
};

}  // namespace ktmoe
