#include "sft/cache_stack.h"

#include <algorithm>
#include <utility>

namespace ktmoe {

bool CacheStack::is_revoked(const TrainingCall* call) const {
  const std::lock_guard lock(mutex_);
  return call != nullptr && call->is_revoked_;
}

CacheStack::Cache CacheStack::take_spare() {
  const std::lock_guard lock(mutex_);
  const size_t most = waiting_.size() + num_out_ + 1;
  waiting_.reserve(most);
  spare_.reserve(spare_.size() + most);
  if (spare_.empty()) return std::make_unique<ForwardCache>();
  Cache cache = std::move(spare_.back());
  spare_.pop_back();
  return cache;
}

void CacheStack::push(Cache cache, TrainingCall* call) noexcept {
  const std::lock_guard lock(mutex_);
  if (call != nullptr && call->is_revoked_) return keep_memory(std::move(cache));
  cache->id = ++last_id_;
  cache->is_overwritten = false;
  step_ = cache->step + 1;
  if (call != nullptr) call->saved_id_ = cache->id;
  insert(std::move(cache));
}

void CacheStack::give_back(Cache cache) noexcept {
  const std::lock_guard lock(mutex_);
  keep_memory(std::move(cache));
}

CacheStack::Cache CacheStack::take_last() {
  const std::lock_guard lock(mutex_);
  if (waiting_.empty()) return nullptr;
  Cache cache = std::move(waiting_.back());
  waiting_.pop_back();
  ++num_out_;
  is_in_use_ = true;
  return cache;
}

void CacheStack::put_back(Cache cache) noexcept {
  const std::lock_guard lock(mutex_);
  is_in_use_ = false;
  --num_out_;
  insert(std::move(cache));
}

void CacheStack::use_up(Cache cache, TrainingCall* call) noexcept {
  const std::lock_guard lock(mutex_);
  is_in_use_ = false;
  if (call != nullptr && !call->is_revoked_ && !call->is_final_) {
    call->used_up_ = std::move(cache);
    call->num_drops_ = num_drops_;
    return update_counts();
  }
  --num_out_;
  call != nullptr && call->is_revoked_ ? insert(std::move(cache)) : keep_memory(std::move(cache));
}

// In a forked child the lock may stay locked forever, by a thread that only the parent has.
void CacheStack::settle(TrainingCall& call) noexcept {
  if (fork_guard_.in_child()) return;
  const std::lock_guard lock(mutex_);
  call.is_final_ = true;
  if (call.used_up_ == nullptr) return;
  --num_out_;
  keep_memory(std::move(call.used_up_));
}

bool CacheStack::is_last(uint32_t caller_id, uint32_t num_tokens) const {
  const std::lock_guard lock(mutex_);
  if (waiting_.empty() || caller_id == 0) return false;
  const ForwardCache& last = *waiting_.back();
  return last.caller_id == caller_id && last.num_tokens == num_tokens;
}

void CacheStack::revoke(TrainingCall& call) noexcept {
  if (fork_guard_.in_child()) return;
  const std::lock_guard lock(mutex_);
  call.is_revoked_ = true;
  if (call.used_up_ != nullptr) {
    --num_out_;
    const bool is_wanted = call.num_drops_ == num_drops_;
    is_wanted ? insert(std::move(call.used_up_)) : keep_memory(std::move(call.used_up_));
  }
  if (call.saved_id_ == 0) return;
  const auto is_saved = [&](const Cache& cache) { return cache->id == call.saved_id_; };
  const auto saved = std::find_if(waiting_.begin(), waiting_.end(), is_saved);
  if (saved == waiting_.end()) return;  // another thread has used it
  Cache cache = std::move(*saved);
  waiting_.erase(saved);
  if (step_ == cache->step + 1) step_ = cache->step;  // unless another pass has been saved since
  keep_memory(std::move(cache));
}

void CacheStack::drop_waiting() {
  const std::lock_guard lock(mutex_);
  ++num_drops_;
  while (!waiting_.empty()) {
    Cache cache = std::move(waiting_.back());
    waiting_.pop_back();
    keep_memory(std::move(cache));
  }
}

void CacheStack::clear() {
  const std::lock_guard lock(mutex_);
  ++num_drops_;
  waiting_.clear();
  spare_.clear();
  update_counts();
}

// ---- with the lock ----

// Cannot fail: take_spare() has reserved room for all caches that are out.
void CacheStack::insert(Cache cache) noexcept {
  const auto is_later = [&](const Cache& other) { return other->id > cache->id; };
  const auto at = std::find_if(waiting_.begin(), waiting_.end(), is_later);
  waiting_.insert(at, std::move(cache));
  update_counts();
}

void CacheStack::keep_memory(Cache cache) noexcept {
  cache->lora.reset();
  if (waiting_.size() + spare_.size() < depth_) spare_.push_back(std::move(cache));
  update_counts();
}

void CacheStack::update_counts() noexcept {
  num_waiting_ = waiting_.size() + (is_in_use_ ? 1 : 0);
  size_t sum = 0;
  for (const auto* list : {&waiting_, &spare_})
    for (const auto& cache : *list) sum += cache->memory.capacity();
  bytes_ = sum;
}

}  // namespace ktmoe
