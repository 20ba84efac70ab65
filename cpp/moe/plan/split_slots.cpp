#include "moe/plan/split_slots.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "moe/plan/routing_plan.h"

namespace ktmoe {
namespace {

// How many slots of a token come before this one. NaN is less than any weight.
uint32_t rank_of(uint32_t slot, const float* weights, uint32_t num_slots) {
  const float own = weights[slot];
  uint32_t before = 0;
  for (uint32_t p = 0; p < num_slots; ++p) {
    const float other = weights[p];
    const bool is_larger = other > own || (own != own && other == other);
    const bool is_equal = other == own || (own != own && other != other);
    before += is_larger || (is_equal && p < slot);
  }
  return before;
}

}  // namespace

// An id is read once: its owner may write to it meanwhile, and so may that of the arrays written here.
template <class Id>
void SlotSplit::split(const Id* ids_at, size_t used, std::vector<uint8_t>& uses) const {
  const uint32_t num_immediate = num_slots - num_deferred;
  for (size_t i = 0; i < used; ++i) {
    const auto slot = static_cast<uint32_t>(i % num_slots);
    const bool is_deferred =
        num_deferred != 0 && rank_of(slot, weights + (i - slot), num_slots) >= num_immediate;
    const int64_t id = read_once(ids_at + i);
    if (id >= num_experts) throw_wrong_expert(id, i, num_slots, num_experts);
    if (id >= 0) uses[static_cast<size_t>(id)] |= is_deferred ? kDeferred : kImmediate;
    immediate[i] = is_deferred ? -1 : id;
    if (deferred != nullptr) deferred[i] = is_deferred ? id : -1;
  }
}

void SlotSplit::run() {
  is_joint = false;
  const size_t used = size_t{checked_num_used()} * num_slots, all = size_t{num_tokens} * num_slots;
  std::vector<uint8_t> uses(num_experts, 0);
  std::visit([&](const auto* at) { split(at, used, uses); }, ids);
  std::fill(immediate + used, immediate + all, int64_t{-1});
  if (deferred == nullptr) return;
  std::fill(deferred + used, deferred + all, int64_t{-1});
  is_joint = shares_experts(uses);
}

uint32_t SlotSplit::checked_num_used() const {
  const auto number = [&](const auto* at) -> int64_t {
    return at == nullptr ? int64_t{num_tokens} : read_once(at);
  };
  const int64_t used = std::visit(number, num_used);
  if (used < 0 || used > num_tokens)
    throw_out_of_range("num_tokens: got ", used, ", expected 0 to ", num_tokens);
  return static_cast<uint32_t>(used);
}

// Reading weights twice costs more than waiting for fewer experts saves, which is a GPU's part of a layer:
// some tenths of the time of one token's experts, less for more tokens.
bool SlotSplit::shares_experts(const std::vector<uint8_t>& uses) {
  constexpr size_t kJointFromOneIn = 16;  // experts that are used
  const auto shared = static_cast<size_t>(std::count(uses.begin(), uses.end(), kImmediate | kDeferred));
  const auto unused = static_cast<size_t>(std::count(uses.begin(), uses.end(), 0));
  return shared * kJointFromOneIn > uses.size() - unused;
}

}  // namespace ktmoe
