#include "sft/backward_activation.h"

namespace ktmoe {

void backward_activation(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task) {
  const uint32_t rows = task.m1 - task.m0, hidden = pass.hidden(), inter = pass.inter(), rank = pass.rank();
  const size_t row = pass.first_row(task), e = pass.expert(task).expert;
  const Span columns{task.n0, task.n1};
  const kernels::RowsView q{pass.args->grad_output, hidden, pass.tokens(task)};
  const kernels::Operand& lhs = scratch.packed.pack_once(pass.kernels(), q, task, hidden, scratch.lhs);

  kernels::ActivateBackwardArgs args;
  scratch.terms.clear();
  add_terms(pass, lhs, &ExpertMatrices::down, &OutputShare::hidden, e, scratch.terms);
  if (rank) {
    const size_t stride = pass.rank_stride();
    const kernels::NnTerm adapter =
        adapter_term(pass, pass.kernels().lhs_in_place(pass.rows.r + row * stride, stride, rows, rank),
                     LoraId::kDownA, task);
    const MaskView mask = mask_of_h(pass);
    if (!mask.bits && pass.scale_is_exact()) {
      scratch.terms.push_back(adapter);
    } else {
      multiply_terms(pass, {&adapter, 1}, columns, scratch.l, columns.size(), scratch.products);
      if (mask.bits) drop_columns(pass.kernels(), mask, pass.tokens(task), rows, columns, scratch.l);
      args.l = scratch.l, args.lora_scale = pass.scale_is_exact() ? 1.0f : pass.lora_scale;
    }
  }
  kernels::NnArgs nn;
  if (pass.segments.size() == 1 && columns.end < inter) {  // prefetch for the next task
    nn.next_w = scratch.terms[0].w, nn.next_n = hidden;
    nn.next_k0 = columns.end, nn.next_k1 = std::min(columns.end + columns.size(), inter);
  }
  multiply_terms(pass, scratch.terms, columns, scratch.c, columns.size(), scratch.products, nn);

  args.activation = pass.config->activation;
  args.m = rows, args.n = columns.size();
  args.z = scratch.c, args.z_stride = columns.size();
  args.weight = pass.cache->row_weight + row;
  args.kept = kept_from(pass.cache->rows.kept, row, task.n0);
  args.d_stride = pass.inter_stride();
  args.d_gate = pass.rows.d_gate + row * args.d_stride + task.n0;
  if (pass.gated()) args.d_up = pass.rows.d_up + row * args.d_stride + task.n0;
  args.grad_weight = pass.rows.grad_weight + row * pass.rows.blocks + task.n0 / kernels::kOutputBlock;
  args.grad_weight_stride = pass.rows.blocks;
  pass.kernels().activate_backward(args);
}

}  // namespace ktmoe
