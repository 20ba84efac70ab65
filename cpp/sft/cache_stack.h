// The saved forward passes that wait for their backward pass, and calls that can be revoked.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/fork_guard.h"
#include "sft/forward_cache.h"

namespace ktmoe {

class TrainingCall;

// Last in, first out. The memory of finished passes is reused.
//
// A layer computes one pass at a time, but other threads may revoke calls at any time, so the stack has its
// own lock. It is never locked during a computation or a wait.
class CacheStack {
 public:
  using Cache = std::unique_ptr<ForwardCache>;

  explicit CacheStack(size_t depth) : depth_(depth) {}

  // All of these may be called while a pass runs. A cache in use by a backward pass still counts.
  size_t size() const { return num_waiting_; }
  size_t bytes() const { return bytes_; }
  size_t depth() const { return depth_; }
  // The number of the next forward that is saved.
  uint32_t step() const { return step_; }
  void set_step(uint32_t step) { step_ = step; }

  bool is_revoked(const TrainingCall* call) const;

  // ---- forward passes ----

  // A cache to fill, perhaps with reused memory. push() and give_back() of it cannot fail.
  Cache take_spare();
  // Saves it, unless the call has been revoked.
  void push(Cache cache, TrainingCall* call) noexcept;
  // Returns an unused cache; its memory is kept if the stack has room.
  void give_back(Cache cache) noexcept;

  // ---- backward passes ----

  // The last saved cache, null when there is none.
  Cache take_last();
  // Returns it unused; is_overwritten says whether its rows are still valid.
  void put_back(Cache cache) noexcept;
  // Marks it used. A call that can still be revoked keeps it, so that revoking restores it.
  void use_up(Cache cache, TrainingCall* call) noexcept;
  // Ends the right to revoke a call, whether its task has run or not.
  void settle(TrainingCall& call) noexcept;

  // Whether the last saved cache has this caller_id, above 0, and this number of tokens.
  bool is_last(uint32_t caller_id, uint32_t num_tokens) const;

  // Undoes a call: the caches and the step are as before it. A task of it that still runs, or runs later,
  // saves nothing.
  void revoke(TrainingCall& call) noexcept;

  // Drops all saved passes, also those that revoking a call would restore. Keeps their memory.
  void drop_waiting();
  // The same, and releases their memory.
  void clear();

 private:
  void insert(Cache cache) noexcept;
  void keep_memory(Cache cache) noexcept;
  void update_counts() noexcept;

  const size_t depth_;
  const ForkGuard fork_guard_;
  mutable std::mutex mutex_;
  std::vector<Cache> waiting_, spare_;  // waiting_ by id
  size_t num_out_ = 0;                  // taken by backward passes and neither returned nor settled
  bool is_in_use_ = false;              // by the backward pass that runs
  uint64_t last_id_ = 0;
  uint64_t num_drops_ = 0;  // calls of drop_waiting() and clear()
  std::atomic<size_t> num_waiting_{0}, bytes_{0};
  std::atomic<uint32_t> step_{0};
};

// A pass that its caller may revoke before, while and after it runs: an exception (Ctrl-C) may end the call
// but not the pass. The fields are guarded by the stack's lock.
class TrainingCall {
 public:
  explicit TrainingCall(std::shared_ptr<CacheStack> stack) : stack_(std::move(stack)) {}
  ~TrainingCall() { stack_->settle(*this); }
  TrainingCall(const TrainingCall&) = delete;
  TrainingCall& operator=(const TrainingCall&) = delete;

  void revoke() noexcept { stack_->revoke(*this); }
  // The call can no longer be revoked.
  void finish() noexcept { stack_->settle(*this); }

 private:
  friend class CacheStack;
  const std::shared_ptr<CacheStack> stack_;
  bool is_revoked_ = false, is_final_ = false;
  uint64_t saved_id_ = 0;      // of what a forward pass has saved
  CacheStack::Cache used_up_;  // by a backward pass
  uint64_t num_drops_ = 0;     // at that time
};

}  // namespace ktmoe
