// Destroying an exception may run any code, so it happens outside of the lock.
#include "runtime/task_errors.h"

#include <algorithm>
#include <utility>

namespace ktmoe {

void TaskErrors::add(uint64_t ticket, std::exception_ptr error) noexcept {
  std::exception_ptr dropped;
  const std::lock_guard lock(mutex_);
  if (errors_.size() == kMaxKept) {
    dropped = std::move(errors_.back().error);
    errors_.pop_back();
  }
  errors_.push_back({ticket, std::move(error)});
  num_kept_ = errors_.size();
}

void TaskErrors::forget(uint64_t ticket) {
  std::exception_ptr forgotten;
  const std::lock_guard lock(mutex_);
  const auto found = first_from(ticket);
  if (found == errors_.end() || found->ticket != ticket) return;
  forgotten = std::move(found->error);
  errors_.erase(found);
  num_kept_ = errors_.size();
}

std::exception_ptr TaskErrors::take_first_through(uint64_t last) {
  if (num_kept_ == 0) return nullptr;
  std::vector<Entry> taken;
  {
    const std::lock_guard lock(mutex_);
    const auto end = first_from(last + 1);
    taken.assign(errors_.begin(), end);
    errors_.erase(errors_.begin(), end);
    num_kept_ = errors_.size();
  }
  return taken.empty() ? nullptr : taken.front().error;
}

std::vector<TaskErrors::Entry>::iterator TaskErrors::first_from(uint64_t ticket) {
  return std::lower_bound(errors_.begin(), errors_.end(), ticket,
                          [](const Entry& entry, uint64_t bound) { return entry.ticket < bound; });
}

}  // namespace ktmoe
