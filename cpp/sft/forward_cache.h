// What the backward pass needs of a forward pass, and the stack of those that wait for theirs.
#pragma once

#include <memory>
#include <vector>

#include "core/aligned_buffer.h"
#include "kernels/contract.h"
#include "moe/routing_plan.h"
#include "sft/config.h"
#include "sft/lora.h"

namespace ktmoe {

// Rows are those of the routing plan: the tokens of an expert, one after the other. The memory is the cache's
// own or, for rows that are not kept (CachedRows), borrowed for as long as they are needed.
struct CachedRows {
  kernels::KeptRows kept;  // g, u, h [rows, I]
  bf16* inner[3] = {};     // ug, uu, ud [rows, R]: bf(x A^T) of gate, up, down
};

struct ForwardCache {
  uint32_t num_tokens = 0;
  uint32_t number = 0;  // the caller's, if any
  uint32_t step = 0;    // of the dropout masks
  RoutingPlan plan;
  std::shared_ptr<const LoraWeights> lora;
  bf16* hidden = nullptr;         // x [T, H]; a token that is not finite is all NaN
  float* row_weight = nullptr;    // [rows]: what each counts in its token's sum
  float* input_weight = nullptr;  // [T, P]: what scales the inputs, of a layer that does; else null
  uint8_t* mask_x = nullptr;      // [T, mask_row_bytes(H)]: what dropout keeps; null without
  uint8_t* mask_h = nullptr;      // [T, mask_row_bytes(I)]
  CachedRows rows;
  AlignedBuffer memory;
};

// Forward passes that wait for their backward pass; the last one goes first. The memory of those that are
// done serves the next.
class CacheStack {
 public:
  explicit CacheStack(size_t depth) : depth_(depth) {}

  size_t size() const { return waiting_.size(); }
  bool full() const { return size() >= depth_; }
  ForwardCache& top() { return *waiting_.back(); }

  // One to fill, perhaps with memory.
  std::unique_ptr<ForwardCache> take_spare() {
    if (spare_.empty()) return std::make_unique<ForwardCache>();
    auto cache = std::move(spare_.back());
    spare_.pop_back();
    return cache;
  }
  // Makes room for one more, so that what follows cannot fail.
  void reserve() {
    waiting_.reserve(waiting_.size() + 1);
    spare_.reserve(spare_.size() + waiting_.size() + 1);
  }
  void push(std::unique_ptr<ForwardCache> cache) noexcept { waiting_.push_back(std::move(cache)); }
  void pop() noexcept {
    auto cache = std::move(waiting_.back());
    waiting_.pop_back();
    give_back(std::move(cache));
  }
  // Keeps the memory of one that is not wanted any more, unless the stack has no use for it.
  void give_back(std::unique_ptr<ForwardCache> cache) noexcept {
    cache->lora.reset();
    if (waiting_.size() + spare_.size() < depth_) spare_.push_back(std::move(cache));
  }
  void clear() {
    waiting_.clear();
    spare_.clear();
  }
  size_t bytes() const {
    size_t sum = 0;
    for (const auto* list : {&waiting_, &spare_})
      for (const auto& cache : *list) sum += cache->memory.capacity();
    return sum;
  }

 private:
  size_t depth_;
  std::vector<std::unique_ptr<ForwardCache>> waiting_, spare_;
};

}  // namespace ktmoe
