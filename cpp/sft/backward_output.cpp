#include "sft/backward_output.h"

namespace ktmoe {

void backward_output(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task) {
  const uint32_t rows = task.m1 - task.m0, hidden = pass.hidden(), rank = pass.rank();
  const size_t row = pass.first_row(task);
  const kernels::RowsView q{pass.args->grad_output, hidden, pass.tokens(task)};
  const kernels::ElementwiseKernels& elementwise = pass.kernels().elementwise;
  BackwardRows& out = pass.rows;
  if (rank) {
    const kernels::Operand lhs = pass.kernels().pack_lhs(q, rows, hidden, scratch.lhs);
    const WeightView b = pass.adapter(LoraId::kDownB, task);
    const size_t stride = pass.rank_stride();
    bf16* r = out.r + row * stride;
    rounded_product(pass, scratch, lhs, b, 1.0f, r, stride);
    const bf16* ud = pass.cache->rows.lora_hidden[2] + row * rank;
    for (uint32_t m = 0; m < rows; ++m) {
      const float w = pass.cache->row_weight[row + m], sw = pass.lora_scale * w;
      const size_t at = (row + m) * rank;
      bf16* row_of_r = r + m * stride;
      elementwise.scale(row_of_r, sw, rank, out.weighted_r + at);
      elementwise.scale(ud + m * rank, w, rank, out.weighted_ud + at);
      if (pass.scale_is_exact()) elementwise.scale(row_of_r, pass.lora_scale, rank, row_of_r);
    }
    pass.kernels().pack_lhs_in_place(r, stride, rows, rank, scratch.lhs);
  }
  for (uint32_t m = 0; m < rows; ++m) {
    float sum = 0;
    if (!pass.biases->down.empty()) {
      const float* bias = pass.biases->down.data() + pass.expert(task).expert * size_t{hidden};
      const bf16* values = q.data + static_cast<size_t>(q.index[m]) * hidden;
      sum = elementwise.dot(values, bias, hidden);
    }
    out.grad_weight[(row + m + 1) * out.blocks - 1] = sum;
  }
}

}  // namespace ktmoe
