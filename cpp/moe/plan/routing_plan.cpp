#include "moe/plan/routing_plan.h"

#include <algorithm>
#include <iterator>

#include "core/error.h"

namespace ktmoe {

int64_t read_expert_id(const int64_t* ids, size_t i, uint32_t num_slots, uint32_t num_experts) {
  const int64_t id = read_once(ids + i);
  if (id >= num_experts) throw_wrong_expert(id, i, num_slots, num_experts);
  return id;
}

void RoutingPlan::build(const int64_t* ids, uint32_t num_tokens, uint32_t num_slots, uint32_t num_experts,
                        const uint8_t* skip, const TokenAdapters& adapters) {
  group_tokens(adapters, num_tokens);
  const auto num_groups = static_cast<uint32_t>(adapter_of_group_.size());
  const size_t num_ids = size_t{num_tokens} * num_slots;
  row.resize(num_ids);
  next_row_.assign(size_t{num_experts} * num_groups, 0);
  expert_slots.assign(counts_slots ? num_experts : 0, 0);

  // From here on `row` has each slot's expert and group, and `ids` is not read again: its owner may write to
  // it.
  uint32_t num_rows = 0;
  for (size_t i = 0; i < num_ids; ++i) {
    const int64_t id = read_expert_id(ids, i, num_slots, num_experts);
    if (counts_slots && id >= 0) ++expert_slots[static_cast<size_t>(id)];
    const bool skipped = id < 0 || (skip != nullptr && skip[id] != 0);
    row[i] = -1;
    if (skipped) continue;
    const int32_t group = group_.empty() ? 0 : group_[i / num_slots];
    row[i] = static_cast<int32_t>(id) * static_cast<int32_t>(num_groups) + group;
    ++next_row_[static_cast<size_t>(row[i])];
    ++num_rows;
  }

  active.clear(), adapted.clear();
  uint32_t begin = 0;
  for (uint32_t i = 0; i < next_row_.size(); ++i) {
    const uint32_t rows = next_row_[i];
    if (rows) add_rows(i / num_groups, begin, rows, adapter_of_group_[i % num_groups]);
    next_row_[i] = begin;
    begin += rows;
  }

  token.resize(num_rows);
  for (size_t i = 0; i < num_ids; ++i) {
    if (row[i] < 0) continue;
    const uint32_t r = next_row_[static_cast<size_t>(row[i])]++;
    row[i] = static_cast<int32_t>(r);
    token[r] = static_cast<int32_t>(i / num_slots);
  }
}

void RoutingPlan::add_rows(uint32_t expert, uint32_t begin, uint32_t rows, int32_t adapter) {
  if (active.empty() || active.back().expert != expert) active.push_back({expert, begin, 0});
  active.back().rows += rows;
  if (!group_.empty()) adapted.push_back({begin, rows, adapter});
}

const RoutingPlan::AdapterRows& RoutingPlan::adapted_at(size_t row) const {
  const auto behind = std::upper_bound(adapted.begin(), adapted.end(), row,
                                       [](size_t at, const AdapterRows& rows) { return at < rows.begin; });
  return *std::prev(behind);
}

void RoutingPlan::group_tokens(const TokenAdapters& adapters, uint32_t num_tokens) {
  adapter_of_group_.assign(1, -1);
  group_.clear();
  if (adapters.number == nullptr) return;
  const auto num_adapters = static_cast<int32_t>(adapters.exists.size());
  group_of_adapter_.assign(adapters.exists.size(), 0);
  for (uint32_t t = 0; t < num_tokens; ++t) {
    const int32_t number = read_once(adapters.number + t);
    if (number >= num_adapters || (number >= 0 && !adapters.exists[static_cast<size_t>(number)]))
      throw_out_of_range("adapters: got ", number, " at [", t,
                         "], expected the number of a loaded adapter, or a "
                         "negative one for none");
    group_.push_back(number);
    if (number >= 0) group_of_adapter_[static_cast<size_t>(number)] = 1;
  }
  for (int32_t number = 0; number < num_adapters; ++number) {
    int32_t& group = group_of_adapter_[static_cast<size_t>(number)];
    if (group == 0) continue;
    group = static_cast<int32_t>(adapter_of_group_.size());
    adapter_of_group_.push_back(number);
  }
  for (int32_t& group : group_) group = group < 0 ? 0 : group_of_adapter_[static_cast<size_t>(group)];
}

void throw_wrong_expert(int64_t id, size_t i, uint32_t num_slots, uint32_t num_experts) {
  throw_out_of_range("topk_ids: got expert ", id, " at [", i / num_slots, ", ", i % num_slots,
                     "], expected ids below ", num_experts, " (negative ids are skipped)");
}

}  // namespace ktmoe
