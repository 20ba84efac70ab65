// The forward passes that wait for their backward pass, and the calls that may take a pass back.
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

// The last one goes first. The memory of those that are done serves the next.
//
// A layer computes one pass at a time, but passes are taken back by other threads at any time, so the stack
// has a lock of its own. It is never held while something is computed, nor while anything waits.
class CacheStack {
 public:
  using Cache = std::unique_ptr<ForwardCache>;

  explicit CacheStack(size_t depth) : depth_(depth) {}

  // All may be asked for while a pass runs. One that a backward pass works on still waits.
  size_t size() const { return num_waiting_; }
  size_t bytes() const { return bytes_; }
  size_t depth() const { return depth_; }
  // The number of the next forward that is saved.
  uint32_t step() const { return step_; }
  void set_step(uint32_t step) { step_ = step; }

  bool is_revoked(const TrainingCall* call) const;

  // ---- forward passes ----

  // One to fill, perhaps with memory; what follows with it cannot fail.
  Cache take_spare();
  // Saves it, unless the call was taken back meanwhile.
  void push(Cache cache, TrainingCall* call) noexcept;
  // Keeps the memory of one that is not wanted any more, unless the stack has no use for it.
  void give_back(Cache cache) noexcept;

  // ---- backward passes ----

  // The last one, null when none waits.
  Cache take_last();
  // It is as it was, but for what is_overwritten says.
  void put_back(Cache cache) noexcept;
  // It was used; the call, if any, may still be taken back and so has it for as long as it lives.
  void use_up(Cache cache, TrainingCall* call) noexcept;
  // Of a call that nobody will take back, whether its task has run or not.
  void settle(TrainingCall& call) noexcept;

  // Whether the last one has that number, above 0, and so many tokens.
  bool is_last(uint32_t caller_id, uint32_t num_tokens) const;

  // Makes a call one that never happened; a task of it that runs now, or later, leaves nothing behind.
  void revoke(TrainingCall& call) noexcept;

  // Forgets all that wait. What calls have used up does not come back.
  void drop_waiting();
  // Lets their memory go too.
  void clear();

 private:
  void insert(Cache cache) noexcept;
  void keep_memory(Cache cache) noexcept;
  void update_counts() noexcept;

  const size_t depth_;
  const ForkGuard fork_guard_;
  mutable std::mutex mutex_;
  std::vector<Cache> waiting_, spare_;  // waiting_ by id
  size_t num_out_ = 0;                  // taken for backward passes, and not back nor settled
  bool is_in_use_ = false;              // the last, by the backward pass under way
  uint64_t last_id_ = 0;
  uint64_t num_drops_ = 0;  // times that all were
  std::atomic<size_t> num_waiting_{0}, bytes_{0};
  std::atomic<uint32_t> step_{0};
};

// A pass that its caller may take back before, while and after it runs: when an exception ends the call but
// not the pass. Its fields belong to the stack.
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
