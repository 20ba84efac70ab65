#include "runtime/task_trace.h"

namespace ktmoe {

TaskTrace::TaskTrace(int num_workers, size_t most_spans) : tracks_(static_cast<size_t>(num_workers) + 1) {
  for (Track& track : tracks_) track.spans.reserve(most_spans);
}

void TaskTrace::add(const Span& span) noexcept {
  if (span.worker != kPhase) return append(tracks_[span.worker + 1], span);
  const std::lock_guard lock(phases_mutex_);
  append(tracks_.front(), span);
}

void TaskTrace::append(Track& track, const Span& span) noexcept {
  if (track.spans.size() == track.spans.capacity()) {
    ++track.dropped;
  } else {
    track.spans.push_back(span);
  }
}

std::vector<TaskTrace::Span> TaskTrace::spans() const {
  std::vector<Span> all;
  for (const Track& track : tracks_) all.insert(all.end(), track.spans.begin(), track.spans.end());
  return all;
}

uint64_t TaskTrace::num_dropped() const {
  uint64_t dropped = 0;
  for (const Track& track : tracks_) dropped += track.dropped;
  return dropped;
}

}  // namespace ktmoe
