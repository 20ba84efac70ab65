#include "moe/plan/routing_plan.h"

#include "core/error.h"

namespace ktmoe {

int64_t read_expert_id(const int64_t* ids, size_t i, uint32_t num_slots, uint32_t num_experts) {
  const int64_t id = read_once(ids + i);
  if (id >= num_experts) throw_wrong_expert(id, i, num_slots, num_experts);
  return id;
}

void RoutingPlan::build(const int64_t* ids, uint32_t num_tokens, uint32_t num_slots, uint32_t num_experts,
                        const uint8_t* skip) {
  const size_t num_ids = size_t{num_tokens} * num_slots;
  row.resize(num_ids);
  next_row_.assign(num_experts, 0);
  expert_slots.assign(counts_slots ? num_experts : 0, 0);

  // From here on `row` has each slot's expert, and `ids` is not read again: its owner may write to it.
  uint32_t num_rows = 0;
  for (size_t i = 0; i < num_ids; ++i) {
    const int64_t id = read_expert_id(ids, i, num_slots, num_experts);
    if (counts_slots && id >= 0) ++expert_slots[static_cast<size_t>(id)];
    const bool skipped = id < 0 || (skip != nullptr && skip[id] != 0);
    row[i] = skipped ? -1 : static_cast<int32_t>(id);
    if (skipped) continue;
    ++next_row_[static_cast<size_t>(id)];
    ++num_rows;
  }

  active.clear();
  uint32_t begin = 0;
  for (uint32_t e = 0; e < num_experts; ++e) {
    const uint32_t rows = next_row_[e];
    if (rows) active.push_back({e, begin, rows});
    next_row_[e] = begin;
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

void throw_wrong_expert(int64_t id, size_t i, uint32_t num_slots, uint32_t num_experts) {
  throw_out_of_range("topk_ids: got expert ", id, " at [", i / num_slots, ", ", i % num_slots,
                     "], expected ids below ", num_experts, " (negative ids are skipped)");
}

}  // namespace ktmoe
