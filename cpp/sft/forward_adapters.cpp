#include "sft/forward_adapters.h"

#include <algorithm>

namespace ktmoe {
namespace {

// C = X W^T for rows [n0, n1) of an adapter's matrix.
void multiply_adapter(const TrainingPass& pass, const kernels::Operand& x, const WeightView& w, uint32_t n0,
                      uint32_t n1, float* c, std::byte* scratch) {
  kernels::NtArgs nt;
  nt.x = x, nt.w = w;
  nt.n0 = n0, nt.n1 = n1;
  nt.c = c, nt.scratch = scratch;
  pass.kernels().nt[static_cast<size_t>(FormatId::kBf16)](nt);
}

// to[m, :] = bf(X A^T), rows of R.
void multiply_lora_a(const TrainingPass& pass, WorkerScratch& scratch, const kernels::Operand& x,
                     const WeightView& a, uint32_t rank, bf16* to) {
  for (uint32_t r = 0; r < rank; r += kernels::kMaxCallOutputs) {
    const uint32_t end = std::min(r + kernels::kMaxCallOutputs, rank);
    multiply_adapter(pass, x, a, r, end, scratch.c_gate, scratch.nt);
    kernels::StoreRowsArgs store;
    store.c = scratch.c_gate, store.m = x.rows, store.n = end - r;
    store.y = to + r, store.y_type = kernels::FloatType::kBf16, store.y_stride = pass.most_rank;
    pass.kernels().store_rows(store);
  }
}

}  // namespace

void gate_up_lora_hidden(TrainingPass& pass, WorkerScratch& scratch, const BlockTask& task) {
  const uint32_t rows = task.m1 - task.m0, hidden = pass.hidden(), rank = pass.adapter_of(task).rank;
  if (rank == 0) return;
  const kernels::RowsView x = pass.call->inputs_from(pass.first_row(task));
  if (const MaskView mask = mask_of_x(pass); mask.bits) {
    ForwardScratch& own = pass.forward[scratch.worker];
    copy_dropped(pass.kernels(), x, pass.tokens(task), rows, {0, hidden}, mask, own.dropped);
    scratch.packed = {};
    scratch.packed.operand =
        pass.kernels().pack({own.dropped, hidden, nullptr}, rows, hidden, scratch.operand);
  } else {
    scratch.packed.pack_once(pass.kernels(), x, task, hidden, scratch.operand);
  }
  const size_t at = pass.first_row(task) * pass.most_rank;
  multiply_lora_a(pass, scratch, scratch.packed.operand, pass.adapter(LoraId::kGateA, task), rank,
                  pass.cache->rows.lora_hidden[0] + at);
  if (pass.gated())
    multiply_lora_a(pass, scratch, scratch.packed.operand, pass.adapter(LoraId::kUpA, task), rank,
                    pass.cache->rows.lora_hidden[1] + at);
}

void down_lora_hidden(TrainingPass& pass, WorkerScratch& scratch, const BlockTask& task) {
  const uint32_t rows = task.m1 - task.m0, inter = pass.inter(), rank = pass.adapter_of(task).rank;
  if (rank == 0) return;
  const kernels::RowsView h =
      pass.rows_from(pass.cache->rows.kept.h, pass.inter_stride(), pass.first_row(task));
  if (const MaskView mask = mask_of_h(pass); mask.bits) {
    ForwardScratch& own = pass.forward[scratch.worker];
    copy_dropped(pass.kernels(), h, pass.tokens(task), rows, {0, inter}, mask, own.dropped);
    scratch.packed = {};
    scratch.packed.operand = pass.kernels().pack({own.dropped, inter, nullptr}, rows, inter, scratch.operand);
  } else {
    scratch.packed.pack_once(pass.kernels(), h, task, inter, scratch.operand);
  }
  multiply_lora_a(pass, scratch, scratch.packed.operand, pass.adapter(LoraId::kDownA, task), rank,
                  pass.cache->rows.lora_hidden[2] + pass.first_row(task) * pass.most_rank);
}

const float* adapter_output(TrainingPass& pass, WorkerScratch& scratch, const BlockTask& task, size_t block,
                            size_t projection, LoraId b) {
  ForwardScratch& own = pass.forward[scratch.worker];
  const kernels::RowsView lora_hidden =
      pass.rows_from(pass.cache->rows.lora_hidden[projection], pass.most_rank, pass.first_row(task));
  const uint32_t rank = pass.adapter_of(task).rank;
  const kernels::Operand& x = own.lora_hidden[block].pack_once(pass.kernels(), lora_hidden, task, rank,
                                                               own.lora_hidden_operand[block]);
  multiply_adapter(pass, x, pass.adapter(b, task), task.n0, task.n1, own.l[block], scratch.nt);
  return own.l[block];
}

}  // namespace ktmoe
