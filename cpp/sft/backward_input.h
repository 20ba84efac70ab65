// Backward to the layer's input, for rows of one expert and columns [n0, n1) of H, in fp32:
//
//   dx = dg Wg + du Wu + dug Ag + duu Au   with dropout the last two are 0 where the mask of x drops
//
// The rows of a token are added in slot order and rounded once afterwards, as in the forward pass.
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

// The rows of dg, du, dug and duu as left operands: for each projection one a segment, and one for its
// adapter.
inline void pack_first_gradients(TrainingPass& pass, BackwardScratch& scratch, const PanelTask& task) {
  const uint32_t rows = task.m1 - task.m0, inter = pass.inter(), rank = pass.rank();
  const size_t row = pass.first_row(task);
  scratch.packed.becomes(task);
  LeftPacker packer(pass, scratch);
  const auto add = [&](const bf16* d, const bf16* d_inner) {
    for (const WeightSegment& part : pass.segments) {
      const Span n = part.rows.intermediate;
      packer.add({d + row * inter + n.begin, inter, nullptr}, rows, n.size());
    }
    if (rank) packer.add(pass.rows_from(d_inner, rank, row), rows, rank);
  };
  add(pass.rows.d_gate, pass.rows.d_inner_gate);
  if (pass.gated()) add(pass.rows.d_up, pass.rows.d_inner_up);
}

// `pass_columns` are those of the pass over H, whose results are rows of y.
inline void backward_input(TrainingPass& pass, FormatId format, BackwardScratch& scratch,
                           const PanelTask& task, Span pass_columns, float* y) {
  const uint32_t rows = task.m1 - task.m0, rank = pass.rank();
  const size_t e = pass.expert(task).expert, stride = pass_columns.size();
  const Span columns{task.n0, task.n1};
  float* to = y + pass.first_row(task) * stride + (task.n0 - pass_columns.begin);
  if (!scratch.packed.is(task)) pack_first_gradients(pass, scratch, task);

  const MaskView mask = mask_of_x(pass);
  const kernels::Operand* left = scratch.packed.parts.data();
  bool accumulate = false, accumulate_l = false;
  const auto through = [&](auto matrices, LoraId a, auto next, Span next_columns) {
    for (const WeightSegment& part : pass.segments) {
      const kernels::Operand& g = *left++;
      if (g.k == 0) continue;
      const auto first_row = [&](const WeightView& w) {
        return WeightView{w.row(part.rows.intermediate.begin), w.row_stride_bytes};
      };
      kernels::NnArgs nn = into(to, stride, accumulate, scratch.products);
      if (pass.segments.size() == 1 && next_columns.size()) {
        nn.next_w = first_row((part.matrices->*next)[e]), nn.next_n = g.k;
        nn.next_k0 = next_columns.begin, nn.next_k1 = next_columns.end;
      }
      through_rows(pass, format, g, first_row((part.matrices->*matrices)[e]), columns, nn);
      accumulate = true;
    }
    if (rank == 0) return;
    const kernels::NnArgs nn = mask.bits ? into(scratch.l, columns.size(), accumulate_l, scratch.products)
                                         : into(to, stride, true, scratch.products);
    through_rows(pass, FormatId::kBf16, *left++, pass.adapter(a, task), columns, nn);
    accumulate_l = true;
  };
  // Behind a block of columns of gate comes that of up, then the next block.
  const Span behind{columns.end, std::min(columns.end + columns.size(), pass_columns.end)};
  const bool gated = pass.gated();
  through(&ExpertMatrices::gate, LoraId::kGateA, gated ? &ExpertMatrices::up : &ExpertMatrices::gate,
          gated ? columns : behind);
  if (gated) through(&ExpertMatrices::up, LoraId::kUpA, &ExpertMatrices::gate, behind);
  if (!mask.bits || rank == 0) return;
  drop_columns(mask, pass.tokens(task), rows, columns, scratch.l);
  for (uint32_t m = 0; m < rows; ++m)
    for (uint32_t i = 0; i < columns.size(); ++i) to[m * stride + i] += scratch.l[m * columns.size() + i];
}

}  // namespace ktmoe
