#include "moe/plan/layer_call.h"

#include "core/error.h"

namespace ktmoe {

void LayerCall::plan_batch() {
  const auto slots = static_cast<uint32_t>(config->num_experts_per_tok);
  const auto experts = static_cast<uint32_t>(config->expert_num);
  const int64_t *ids = args->topk_ids, *deferred = args->deferred_ids;
  const TokenAdapters adapters{args->adapters, adapter_exists};
  if (deferred == nullptr)
    return plan.build(ids, args->num_tokens, slots, experts, args->skip_experts, adapters);

  const size_t num_ids = size_t{args->num_tokens} * slots;
  all_ids_.resize(num_ids), is_deferred_.resize(num_ids);
  for (size_t i = 0; i < num_ids; ++i) {
    const int64_t id = read_once(ids + i);
    is_deferred_[i] = id < 0;
    all_ids_[i] = id < 0 ? read_once(deferred + i) : id;
  }
  plan.build(all_ids_.data(), args->num_tokens, slots, experts, args->skip_experts, adapters);
  rows_now_ = plan.row, rows_deferred_ = plan.row;
  for (size_t i = 0; i < num_ids; ++i) (is_deferred_[i] ? rows_now_ : rows_deferred_)[i] = -1;
}

void LayerCall::check_expert_rows(uint32_t num_expert_rows) const {
  if (plan.num_rows() != num_expert_rows)
    throw_invalid("expert_rows: got ", num_expert_rows, " rows, expected ", plan.num_rows(),
                  ", one for each slot that is not skipped");
}

void LayerCall::number_expert_rows() {
  const auto slots = static_cast<size_t>(config->num_experts_per_tok);
  first_expert_row.resize(args->num_tokens);
  size_t count = 0;
  for (size_t t = 0; t < args->num_tokens; ++t) {
    first_expert_row[t] = count;
    for (size_t p = 0; p < slots; ++p) count += plan.row[t * slots + p] >= 0;
  }
}

std::span<const SlotSum> LayerCall::sums() {
  const bool is_split = args->deferred_ids != nullptr;
  sums_[0] = {is_split ? rows_now_.data() : plan.row.data(), args->base, args->base_type, args->out,
              args->out_type};
  if (!is_split) return {sums_.data(), 1};
  constexpr auto kFloat32 = kernels::FloatType::kFloat32;
  sums_[1] = {rows_deferred_.data(), nullptr, kFloat32, args->deferred_out, kFloat32};
  return sums_;
}

}  // namespace ktmoe
