// Backward through the down projection and the activation, for rows of one expert and columns [n0, n1) of I:
//
//   z = q Wd + s r Ad             fp32; with dropout r Ad is 0 where the mask of h drops
//   <z, h>                        for the gradient of the routing weight, block by block
//   dg, du = bf(w z act'(g, u))   which take the place of g and u
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

inline void backward_activation(TrainingPass& pass, FormatId format, BackwardScratch& scratch,
                                const PanelTask& task) {
  const uint32_t rows = task.m1 - task.m0, hidden = pass.hidden(), inter = pass.inter(), rank = pass.rank();
  const size_t row = pass.first_row(task), e = pass.expert(task).expert;
  const Span columns{task.n0, task.n1};
  if (!scratch.packed.is(task)) {
    scratch.packed.becomes(task);
    LeftPacker packer(pass, scratch);
    for (const WeightSegment& part : pass.segments) {
      const Span n = part.rows.hidden;
      packer.add({pass.args->grad_output + n.begin, hidden, pass.tokens(task)}, rows, n.size());
    }
    if (rank) packer.add(pass.rows_from(pass.rows.r, rank, row), rows, rank);
  }

  bool accumulate = false;
  for (size_t i = 0; i < pass.segments.size(); ++i) {
    const WeightSegment& part = pass.segments[i];
    if (part.rows.hidden.size() == 0) continue;
    const WeightView down{part.matrices->down[e].row(part.rows.hidden.begin),
                          part.matrices->down[e].row_stride_bytes};
    kernels::NnArgs nn = into(scratch.c, columns.size(), accumulate, scratch.products);
    if (pass.segments.size() == 1 && columns.end < inter) {  // the task behind this one
      nn.next_w = down, nn.next_n = hidden;
      nn.next_k0 = columns.end, nn.next_k1 = std::min(columns.end + columns.size(), inter);
    }
    through_rows(pass, format, scratch.packed.parts[i], down, columns, nn);
    accumulate = true;
  }
  if (rank) {
    through_rows(pass, FormatId::kBf16, scratch.packed.parts.back(), pass.adapter(LoraId::kDownA, task),
                 columns, into(scratch.l, columns.size(), false, scratch.products));
    if (const MaskView mask = mask_of_h(pass); mask.bits)
      drop_columns(mask, pass.tokens(task), rows, columns, scratch.l);
  }

  kernels::ActivateBackwardArgs args;
  args.activation = pass.config->activation;
  args.m = rows, args.n = columns.size();
  args.z = scratch.c, args.z_stride = columns.size();
  if (rank) args.l = scratch.l, args.lora_scale = pass.lora_scale;
  args.weight = pass.cache->row_weight + row;
  args.kept = kept_from(pass.cache->rows.kept, row, task.n0);
  args.d_gate = pass.rows.d_gate + row * inter + task.n0;
  if (pass.gated()) args.d_up = pass.rows.d_up + row * inter + task.n0;
  args.d_stride = inter;
  args.grad_weight = pass.rows.grad_weight + row * pass.rows.blocks + task.n0 / kernels::kOutputBlock;
  args.grad_weight_stride = pass.rows.blocks;
  pass.kernels().activate_backward(args);
}

}  // namespace ktmoe
