#include "sft/backward_lora_hidden.h"

namespace ktmoe {

void backward_lora_hidden(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task) {
  const size_t row = pass.first_row(task), stride = pass.rank_stride();
  const auto through = [&](const bf16* d, LoraId b, bf16* to) {
    const kernels::Operand lhs = pass.kernels().pack_lhs(pass.rows_from(d, pass.inter_stride(), row),
                                                         task.m1 - task.m0, pass.inter(), scratch.lhs);
    rounded_product(pass, scratch, lhs, pass.adapter(b, task), pass.lora_scale, to + row * stride, stride);
  };
  through(pass.rows.d_gate, LoraId::kGateB, pass.rows.d_lora_gate);
  if (pass.gated()) through(pass.rows.d_up, LoraId::kUpB, pass.rows.d_lora_up);
}

}  // namespace ktmoe
