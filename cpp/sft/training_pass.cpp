#include "sft/training_pass.h"

#include <cmath>

namespace ktmoe {

const kernels::Operand& PackedLhs::pack_once(const kernels::KernelTable& table, const kernels::RowsView& rows,
                                             const BlockTask& task, uint32_t n, std::byte* memory) {
  if (active != task.active || m0 != task.m0) {
    operand = table.pack_lhs(rows, task.m1 - task.m0, n, memory);
    active = task.active, m0 = task.m0;
  }
  return operand;
}

bool TrainingPass::scale_is_exact() const {
  int exponent;
  return std::frexp(lora_scale, &exponent) == 0.5f;
}

RowsAdapter TrainingPass::adapter_of(const BlockTask& task) const {
  if (named == nullptr) return {cache->lora.get(), rank(), lora_scale};
  const int32_t number = plan().adapted_at(first_row(task)).adapter;
  return number < 0 ? RowsAdapter{} : (*named)[static_cast<size_t>(number)];
}

WeightView TrainingPass::adapter(LoraId id, const BlockTask& task) const {
  return adapter_of(task).weights->view(id, logical_expert(expert(task).expert));
}

MaskView mask_of_x(const TrainingPass& pass) { return {pass.cache->mask_x, mask_row_bytes(pass.hidden())}; }

MaskView mask_of_h(const TrainingPass& pass) { return {pass.cache->mask_h, mask_row_bytes(pass.inter())}; }

void copy_dropped(const kernels::KernelTable& kernels, const kernels::RowsView& source, const int32_t* tokens,
                  uint32_t rows, Span columns, const MaskView& mask, bf16* to) {
  for (uint32_t m = 0; m < rows; ++m, to += columns.size()) {
    const size_t row = source.index ? static_cast<size_t>(source.index[m]) : m;
    kernels.elementwise.mask_bf16(source.data + row * source.stride + columns.begin, mask.row(tokens[m]),
                                  columns.begin, columns.size(), to);
  }
}

}  // namespace ktmoe
