#include "sft/backward_input.h"

#include <algorithm>

namespace ktmoe {
namespace {

// The task's contribution to the gradients of routing weights that scale inputs: <dx, x> by blocks of
// columns.
void dot_with_inputs(TrainingPass& pass, const BlockTask& task, const float* grad, size_t stride) {
  const BackwardRows& all = pass.rows;
  if (all.grad_input_weight == nullptr) return;
  const size_t row = pass.first_row(task), hidden = pass.hidden();
  const int32_t* tokens = pass.tokens(task);
  for (uint32_t m = 0; m < task.m1 - task.m0; ++m)
    pass.kernels().elementwise.dot_blocks(
        grad + m * stride, pass.cache->hidden + static_cast<size_t>(tokens[m]) * hidden + task.n0,
        task.n1 - task.n0,
        all.grad_input_weight + (row + m) * all.input_blocks + task.n0 / kernels::kOutputBlock);
}

}  // namespace

void pack_gradients_of_gate_up(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task) {
  const size_t row = pass.first_row(task);
  const auto pack = [&](bf16* d, size_t stride, uint32_t n) {
    pass.kernels().pack_lhs_in_place(d + row * stride, stride, task.m1 - task.m0, n, scratch.lhs);
  };
  const BackwardRows& rows = pass.rows;
  for (bf16* d : {rows.d_gate, rows.d_up})
    if (d) pack(d, pass.inter_stride(), pass.inter());
  for (bf16* d : {rows.d_lora_gate, rows.d_lora_up})
    if (pass.rank()) pack(d, pass.rank_stride(), pass.rank());
}

void backward_input(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task, Span sweep_columns,
                    float* y) {
  const uint32_t rows = task.m1 - task.m0, rank = pass.rank();
  const size_t e = pass.expert(task).expert, row = pass.first_row(task), stride = sweep_columns.size();
  const Span columns{task.n0, task.n1};
  const MaskView mask = mask_of_x(pass);
  const auto lhs = [&](const bf16* d, size_t d_stride, uint32_t n) {
    return pass.kernels().lhs_in_place(d + row * d_stride, d_stride, rows, n);
  };

  std::vector<kernels::NnTerm>& terms = scratch.terms;
  terms.clear();
  kernels::NnTerm dropped[2];
  uint32_t num_dropped = 0;
  const auto add = [&](const bf16* d, auto matrices, const bf16* d_lora, LoraId a) {
    add_terms(pass, lhs(d, pass.inter_stride(), pass.inter()), matrices, &OutputShare::intermediate, e,
              terms);
    if (rank == 0) return;
    const kernels::NnTerm adapter = adapter_term(pass, lhs(d_lora, pass.rank_stride(), rank), a, task);
    if (mask.bits) {
      dropped[num_dropped++] = adapter;
    } else {
      terms.push_back(adapter);
    }
  };
  add(pass.rows.d_gate, &ExpertMatrices::gate, pass.rows.d_lora_gate, LoraId::kGateA);
  if (pass.gated()) add(pass.rows.d_up, &ExpertMatrices::up, pass.rows.d_lora_up, LoraId::kUpA);

  kernels::NnArgs nn;
  if (pass.segments.size() == 1 && columns.end < sweep_columns.end) {  // prefetch for the next task
    nn.next_w = terms[0].w, nn.next_n = pass.inter();
    nn.next_k0 = columns.end, nn.next_k1 = std::min(columns.end + columns.size(), sweep_columns.end);
  }
  float* to = y + row * stride + (task.n0 - sweep_columns.begin);
  multiply_terms(pass, terms, columns, to, stride, scratch.products, nn);
  if (num_dropped != 0) {
    multiply_terms(pass, {dropped, num_dropped}, columns, scratch.l, columns.size(), scratch.products);
    drop_columns(pass.kernels(), mask, pass.tokens(task), rows, columns, scratch.l);
    for (uint32_t m = 0; m < rows; ++m)
      pass.kernels().elementwise.add(scratch.l + m * columns.size(), columns.size(), to + m * stride);
  }
  dot_with_inputs(pass, task, to, stride);
}

}  // namespace ktmoe
