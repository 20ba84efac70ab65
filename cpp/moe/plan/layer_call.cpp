#include "moe/plan/layer_call.h"

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
