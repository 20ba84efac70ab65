#include "moe/split_slots.h"

#include <algorithm>
#include <limits>

#include "core/error.h"

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

template <class Id>
void split(const SlotSplit& s, const Id* ids, uint32_t num_used) {
  const uint32_t num_immediate = s.num_slots - s.num_deferred;
  const size_t used = size_t{num_used} * s.num_slots, all = size_t{s.num_tokens} * s.num_slots;
  for (size_t i = 0; i < used; ++i) {
    const auto slot = static_cast<uint32_t>(i % s.num_slots);
    const bool is_deferred =
        s.num_deferred != 0 && rank_of(slot, s.weights + (i - slot), s.num_slots) >= num_immediate;
    s.immediate[i] = is_deferred ? -1 : ids[i];
    if (s.deferred != nullptr) s.deferred[i] = is_deferred ? ids[i] : -1;
  }
  std::fill(s.immediate + used, s.immediate + all, -1);
  if (s.deferred != nullptr) std::fill(s.deferred + used, s.deferred + all, -1);
}

}  // namespace

void SlotSplit::run() const {
  const auto number = [&](const auto* at) -> int64_t { return at == nullptr ? int64_t{num_tokens} : *at; };
  const int64_t used = std::visit(number, num_used);
  if (used < 0 || used > num_tokens) {
    // What is computed with them is refused too.
    const size_t all = size_t{num_tokens} * num_slots;
    std::fill(immediate, immediate + all, std::numeric_limits<int64_t>::max());
    if (deferred != nullptr) std::fill(deferred, deferred + all, std::numeric_limits<int64_t>::max());
    throw_out_of_range("num_tokens: got ", used, ", expected 0 to ", num_tokens);
  }
  std::visit([&](const auto* at) { split(*this, at, static_cast<uint32_t>(used)); }, ids);
}

}  // namespace ktmoe
