#include "sft/backward_weights.h"

#include <algorithm>

namespace ktmoe {
namespace {

// Rows [begin, begin + count) of an expert's matrix, columns from `column` on.
kernels::RowsView rows_of(const TrainingPass& pass, const WeightGradient::Rows& rows, size_t begin,
                          uint32_t column) {
  const bf16* data = rows.data + column;
  if (rows.of_tokens) return {data, rows.stride, pass.plan().token.data() + begin};
  return {data + begin * rows.stride, rows.stride, nullptr};
}

// Columns of X as they enter the sum: scaled by the routing weights, or masked by dropout.
void make_chunk(const TrainingPass& pass, const WeightGradient::Rows& x, size_t begin, uint32_t count,
                Span columns, bf16* to) {
  if (x.mask.bits)
    return copy_dropped(pass.kernels(), rows_of(pass, x, begin, 0), pass.plan().token.data() + begin, count,
                        columns, x.mask, to);
  for (uint32_t m = 0; m < count; ++m, to += columns.size())
    pass.kernels().elementwise.scale(x.data + (begin + m) * x.stride + columns.begin,
                                     pass.cache->row_weight[begin + m], columns.size(), to);
}

// Adds the contribution of one expert of the plan.
void add_weight_gradient(const TrainingPass& pass, const WeightGradient& gradient,
                         const RoutingPlan::ExpertRows& expert, BackwardScratch& scratch, kernels::TnArgs tn,
                         Span n, Span k) {
  const bool made = gradient.x.weighted || gradient.x.mask.bits;
  const uint32_t step = made ? kChunkRows : expert.rows;
  for (uint32_t m = 0; m < expert.rows; m += step) {
    const size_t begin = size_t{expert.begin} + m;
    tn.m = std::min(step, expert.rows - m);
    tn.g = rows_of(pass, gradient.g, begin, n.begin);
    tn.x = rows_of(pass, gradient.x, begin, k.begin);
    if (made) {
      make_chunk(pass, gradient.x, begin, tn.m, k, scratch.chunk);
      tn.x = {scratch.chunk, k.size(), nullptr};
    }
    pass.kernels().tn(tn);
    tn.accumulate = true;
  }
}

}  // namespace

std::vector<WeightGradient> weight_gradients(const TrainingPass& pass) {
  using Rows = WeightGradient::Rows;
  const BackwardArgs& args = *pass.args;
  const BackwardRows& rows = pass.rows;
  const CachedRows& cached = pass.cache->rows;
  const uint32_t hidden = pass.hidden(), inter = pass.inter(), rank = pass.rank();
  const Rows q{args.grad_output, hidden, hidden, true}, h{cached.kept.h, inter, cached.kept.stride};
  const kernels::RowsView inputs = pass.call->inputs();
  const Rows x{inputs.data, hidden, inputs.stride, !pass.config->scale_inputs};
  Rows dropped_x = x, dropped_h = h, weighted_h = h;
  dropped_x.mask = mask_of_x(pass), dropped_h.mask = mask_of_h(pass), weighted_h.weighted = true;
  const auto of_rank = [&](const bf16* data) { return Rows{data, rank, rank}; };
  const auto d_lora = [&](const bf16* data) { return Rows{data, rank, pass.rank_stride()}; };
  const auto of_inter = [&](const bf16* data) { return Rows{data, inter, pass.inter_stride()}; };
  const auto lora = [&](LoraId id) { return args.lora[static_cast<size_t>(id)]; };
  const float s = pass.lora_scale;
  std::vector<WeightGradient> all = {
      {lora(LoraId::kDownB), of_rank(rows.weighted_ud), q, s, true},
      {lora(LoraId::kDownA), of_rank(rows.weighted_r), dropped_h, 1, false},
      {lora(LoraId::kGateB), of_rank(cached.lora_hidden[0]), of_inter(rows.d_gate), s, true},
      {lora(LoraId::kGateA), d_lora(rows.d_lora_gate), dropped_x, 1, false},
      {lora(LoraId::kUpB), of_rank(cached.lora_hidden[1]), of_inter(rows.d_up), s, true},
      {lora(LoraId::kUpA), d_lora(rows.d_lora_up), dropped_x, 1, false},
      {args.down_proj, q, weighted_h, 1, false},
      {args.gate_proj, of_inter(rows.d_gate), x, 1, false},
      {args.up_proj, of_inter(rows.d_up), x, 1, false},
  };
  std::erase_if(all, [](const WeightGradient& g) { return g.d == nullptr || g.g.width == 0; });
  return all;
}

std::vector<WeightGradientTask> cut_weight_gradients(const std::vector<WeightGradient>& gradients,
                                                     uint32_t num_experts) {
  std::vector<WeightGradientTask> tasks;
  const auto each = [](uint32_t width, uint32_t step, auto&& function) {
    for (uint32_t i = 0; i < width; i += step) function(Span{i, std::min(i + step, width)});
  };
  for (uint32_t e = 0; e < num_experts; ++e)
    for (uint32_t i = 0; i < gradients.size(); ++i)
      each(gradients[i].g.width, kernels::kMaxTnRows, [&](Span n) {
        each(gradients[i].x.width, kernels::kMaxTnColumns, [&](Span k) { tasks.push_back({i, e, n, k}); });
      });
  return tasks;
}

void backward_weights(const TrainingPass& pass, const std::vector<WeightGradient>& gradients,
                      BackwardScratch& scratch, const WeightGradientTask& task) {
  const WeightGradient& gradient = gradients[task.gradient];
  const size_t height = gradient.g.width, width = gradient.x.width;
  kernels::TnArgs tn;
  tn.n = task.n.size(), tn.k = task.k.size();
  tn.n_stride = gradient.transposed ? 1 : width, tn.k_stride = gradient.transposed ? height : 1;
  tn.d = gradient.d + task.expert * height * width + task.n.begin * tn.n_stride + task.k.begin * tn.k_stride;
  tn.scale = gradient.scale, tn.accumulate = pass.args->accumulate;
  tn.scratch = scratch.products;
  bool any = false;
  for (const auto& expert : pass.plan().active) {
    if (pass.logical_expert(expert.expert) != task.expert) continue;
    add_weight_gradient(pass, gradient, expert, scratch, tn, task.n, task.k);
    tn.accumulate = any = true;
  }
  if (!any && !tn.accumulate) pass.kernels().tn(tn);  // no rows: writes zeros
}

}  // namespace ktmoe
