#include "sft/sft_moe_tp.h"

#include "moe/layer/moe_base-inl.h"
#include "sft/backward_activation.h"
#include "sft/backward_input.h"
#include "sft/forward_adapters.h"

namespace ktmoe {

template class AMX_MOE_BASE<AMX_SFT_MOE_TP>;

void AMX_SFT_MOE_TP::cut_activation(const LayerCall& call, int num_threads) {
  cut_blocks(call.plan, intermediate_, static_cast<uint32_t>(config_.hidden_size), num_threads, tasks_,
             backward_width());
}

void AMX_SFT_MOE_TP::cut_input(const LayerCall& call, int num_threads, uint32_t i, uint32_t sweeps) {
  begin_sweep(call, num_threads, i, sweeps);
  cut_blocks(call.plan, sweep_columns(), 2 * static_cast<uint32_t>(config_.intermediate_size), num_threads,
             tasks_, backward_width());
}

void AMX_SFT_MOE_TP::activation(uint32_t worker, uint32_t task) {
  backward_activation(*pass_, pass_->backward[worker], tasks_[task]);
}

void AMX_SFT_MOE_TP::input(uint32_t worker, uint32_t task) {
  backward_input(*pass_, pass_->backward[worker], tasks_[task], sweep_columns(), sweep_y());
}

void AMX_SFT_MOE_TP::before_activation(LayerCall&, WorkerScratch& scratch, const BlockTask& task,
                                       kernels::ActivateArgs& act) {
  if (!has_adapter(task)) return;
  act.lora_scale = pass_->adapter_of(task).scale;
  act.l_gate = adapter_output(*pass_, scratch, task, 0, 0, LoraId::kGateB);
  if (pass_->gated()) act.l_up = adapter_output(*pass_, scratch, task, 1, 1, LoraId::kUpB);
}

kernels::KeptRows AMX_SFT_MOE_TP::kept_rows(const LayerCall& call, const BlockTask& task,
                                            uint32_t column) const {
  if (pass_ == nullptr) return Base::kept_rows(call, task, column);
  return kept_from(pass_->cache->rows.kept, pass_->first_row(task), column);
}

void AMX_SFT_MOE_TP::before_store(LayerCall&, WorkerScratch& scratch, const BlockTask& task,
                                  kernels::StoreRowsArgs& store) {
  if (!has_adapter(task)) return;
  store.lora_scale = pass_->adapter_of(task).scale;
  store.l = adapter_output(*pass_, scratch, task, 0, 2, LoraId::kDownB);
}

}  // namespace ktmoe
