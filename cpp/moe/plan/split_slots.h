// Which slots of each token a pass computes at once and which it defers, by the routing at the time when the
// pass runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "moe/plan/integers.h"

namespace ktmoe {

// Of each token all but `num_deferred` slots are immediate: those with the largest weights, ties by slot.
struct SlotSplit {
  Integers ids;                    // [T, P]
  const float* weights = nullptr;  // [T, P]
  uint32_t num_tokens = 0, num_slots = 0, num_experts = 0, num_deferred = 0;
  Integers num_used;             // one number, or null: tokens from it on count as if their ids were negative
  int64_t* immediate = nullptr;  // [T, P]: ids, deferred slots -1
  int64_t* deferred = nullptr;   // [T, P]: ids, immediate slots -1; null when none is deferred

  // Whether deferred slots should be computed with the others, and only their sum be kept for later:
  // both use so many of the same experts that weights would be read twice.
  bool is_joint = false;

  // Throws std::out_of_range for an id of num_experts or above and for a number of tokens outside 0 to T.
  void run();

 private:
  // Which parts use an expert, as bits.
  static constexpr uint8_t kImmediate = 1, kDeferred = 2;

  template <class Id>
  void split(const Id* ids_at, size_t used, std::vector<uint8_t>& uses) const;
  uint32_t checked_num_used() const;
  static bool shares_experts(const std::vector<uint8_t>& uses);
};

}  // namespace ktmoe
