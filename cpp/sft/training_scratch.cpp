#include "sft/training_scratch.h"

#include <algorithm>

namespace ktmoe {
namespace {

size_t kept_stride(const MOESFTConfig& config) {
  return lhs_stride(static_cast<uint32_t>(config.intermediate_size));
}

// Weights are read fastest in long runs, but the results of many rows must leave room in L2 for their inputs.
// (Emerald Rapids, 4 rows per expert: 256 columns are 20 % faster than 128; 256 rows: about 5 %.)
uint32_t columns_for(const RoutingPlan& plan, uint32_t most_rows) {
  const size_t mean_rows = div_up(plan.num_rows(), std::max<size_t>(plan.active.size(), 1));
  return mean_rows <= 8 && most_rows <= 64 ? kernels::kMaxNnColumns : 256;
}

}  // namespace

RowsPlan::RowsPlan(const MOESFTConfig& config, size_t rows, uint32_t rank, bool for_backward,
                   ScratchPlan& plan)
    : config_(config), for_backward_(for_backward) {
  const size_t inter = rows * kept_stride(config);
  const size_t kept = inter * (config.cache_float32 ? sizeof(float) : sizeof(bf16));
  if (for_backward) gate_ = plan.take(kept);
  if (for_backward && config.activation.gated) up_ = plan.take(kept);
  h_ = plan.take(inter * sizeof(bf16));
  for (size_t& at : lora_hidden_) at = plan.take(rows * rank * sizeof(bf16));
}

CachedRows RowsPlan::place(std::byte* base) const {
  using kernels::FloatType;
  CachedRows rows;
  rows.kept = {for_backward_ ? base + gate_ : nullptr,
               for_backward_ && config_.activation.gated ? base + up_ : nullptr,
               config_.cache_float32 ? FloatType::kFloat32 : FloatType::kBf16,
               reinterpret_cast<bf16*>(base + h_), kept_stride(config_)};
  for (size_t i = 0; i < 3; ++i) rows.lora_hidden[i] = reinterpret_cast<bf16*>(base + lora_hidden_[i]);
  return rows;
}

InputPlan::InputPlan(const MOESFTConfig& config, size_t tokens, size_t rows, bool drops, ScratchPlan& plan)
    : drops_(drops) {
  const auto hidden = static_cast<uint32_t>(config.hidden_size);
  hidden_ = plan.take(tokens * hidden * sizeof(bf16));
  weight_ = plan.take(rows * sizeof(float));
  scales_ = config.scale_inputs;
  if (scales_)
    input_weight_ = plan.take(tokens * static_cast<size_t>(config.num_experts_per_tok) * sizeof(float));
  if (!drops) return;
  mask_x_ = plan.take(tokens * mask_row_bytes(hidden));
  mask_h_ = plan.take(tokens * mask_row_bytes(static_cast<uint32_t>(config.intermediate_size)));
}

void InputPlan::place(std::byte* base, ForwardCache& cache) const {
  cache.hidden = reinterpret_cast<bf16*>(base + hidden_);
  cache.row_weight = reinterpret_cast<float*>(base + weight_);
  cache.input_weight = scales_ ? reinterpret_cast<float*>(base + input_weight_) : nullptr;
  cache.mask_x = drops_ ? reinterpret_cast<uint8_t*>(base + mask_x_) : nullptr;
  cache.mask_h = drops_ ? reinterpret_cast<uint8_t*>(base + mask_h_) : nullptr;
}

ForwardWorkersPlan::ForwardWorkersPlan(const TrainingPass& pass, uint32_t rows_of_x, uint32_t rows_of_h,
                                       size_t workers, ScratchPlan& plan)
    : workers_(workers) {
  const auto& k = pass.kernels();
  const uint32_t rows = std::max(rows_of_x, rows_of_h), inter = pass.inter(), hidden = pass.hidden();
  ScratchPlan own;
  // For the base's products, and for the adapters', which are bf16.
  const auto operand_bytes = [&](uint32_t m, uint32_t size) {
    return std::max({k.operand_bytes(m, size), pass.kernel.operand_bytes(k, m, size),
                     pass.call->blocks.any() ? k.block_panels_bytes(m, size) : 0});
  };
  operand_ = own.take(std::max(operand_bytes(rows_of_x, hidden), operand_bytes(rows_of_h, inter)));
  for (size_t& at : c_) at = own.take(k.c_floats(rows, kernels::kMaxCallOutputs) * sizeof(float));
  nt_ = own.take(k.nt_scratch_bytes(std::max({hidden, inter, pass.most_rank})));
  for (size_t& at : lora_hidden_) at = own.take(k.operand_bytes(rows, pass.most_rank));
  drops_ = pass.cache->mask_x != nullptr;
  if (drops_)
    dropped_ = own.take(std::max(size_t{rows_of_x} * hidden, size_t{rows_of_h} * inter) * sizeof(bf16));
  per_worker_ = own.bytes();
  begin_ = plan.take(per_worker_ * workers);
}

void ForwardWorkersPlan::place(std::byte* base, TrainingPass& pass) const {
  pass.call->workers.clear();
  pass.forward.clear();
  for (size_t i = 0; i < workers_; ++i) {
    std::byte* own = base + begin_ + i * per_worker_;
    const auto floats = [&](size_t at) { return reinterpret_cast<float*>(own + at); };
    pass.call->workers.push_back(
        {static_cast<uint32_t>(i), {}, own + operand_, floats(c_[0]), floats(c_[1]), own + nt_});
    pass.forward.push_back({{},
                            {own + lora_hidden_[0], own + lora_hidden_[1]},
                            {floats(c_[2]), floats(c_[3])},
                            drops_ ? reinterpret_cast<bf16*>(own + dropped_) : nullptr});
  }
}

BackwardPlan::BackwardPlan(const TrainingPass& pass, uint32_t most_rows, size_t workers, ScratchPlan& plan)
    : workers_(workers) {
  const auto& k = pass.kernels();
  const size_t rows = pass.plan().num_rows();
  in_place_ = !pass.config->cache_float32;
  columns_ = columns_for(pass.plan(), most_rows);
  separate_l_ = pass.cache->mask_x != nullptr || !pass.scale_is_exact();
  blocks_ = static_cast<uint32_t>(div_up(pass.inter(), kernels::kOutputBlock)) + 1;
  for (size_t& at : rank_rows_) at = plan.take(rows * pass.rank_stride() * sizeof(bf16));
  for (size_t& at : inter_rows_) at = in_place_ ? 0 : plan.take(rows * pass.inter_stride() * sizeof(bf16));
  grad_weight_ = plan.take(rows * blocks_ * sizeof(float));
  scales_ = pass.config->scale_inputs;
  input_blocks_ = static_cast<uint32_t>(div_up(pass.hidden(), kernels::kOutputBlock));
  if (scales_) grad_input_weight_ = plan.take(rows * input_blocks_ * sizeof(float));

  ScratchPlan own;
  lhs_ = own.take(k.lhs_bytes(most_rows, std::max({pass.hidden(), pass.inter(), pass.rank()})));
  const size_t results = size_t{most_rows} * columns_ * sizeof(float);
  c_ = own.take(results), l_ = separate_l_ ? own.take(results) : 0;
  products_ = own.take(std::max(k.nn_scratch_bytes(), k.tn_scratch_bytes()));
  chunk_ = own.take(size_t{kChunkRows} * kernels::kMaxTnColumns * sizeof(bf16));
  per_worker_ = own.bytes();
  begin_ = plan.take(per_worker_ * workers);
}

void BackwardPlan::place(std::byte* base, TrainingPass& pass) const {
  const auto row = [&](size_t at) { return reinterpret_cast<bf16*>(base + at); };
  BackwardRows& rows = pass.rows;
  rows.r = row(rank_rows_[0]), rows.weighted_r = row(rank_rows_[1]), rows.weighted_ud = row(rank_rows_[2]);
  rows.d_lora_gate = row(rank_rows_[3]), rows.d_lora_up = row(rank_rows_[4]);
  const kernels::KeptRows& kept = pass.cache->rows.kept;
  rows.d_gate = in_place_ ? static_cast<bf16*>(kept.gate) : row(inter_rows_[0]);
  rows.d_up = in_place_ ? static_cast<bf16*>(kept.up) : row(inter_rows_[1]);
  rows.grad_weight = reinterpret_cast<float*>(base + grad_weight_), rows.blocks = blocks_;
  rows.grad_input_weight = scales_ ? reinterpret_cast<float*>(base + grad_input_weight_) : nullptr;
  rows.input_blocks = input_blocks_;
  rows.columns = columns_;
  pass.backward.clear();
  for (size_t i = 0; i < workers_; ++i) {
    std::byte* own = base + begin_ + i * per_worker_;
    const auto floats = [&](size_t at) { return reinterpret_cast<float*>(own + at); };
    pass.backward.push_back({{},
                             own + lhs_,
                             {},
                             floats(c_),
                             separate_l_ ? floats(l_) : nullptr,
                             own + products_,
                             reinterpret_cast<bf16*>(own + chunk_)});
  }
}

}  // namespace ktmoe
