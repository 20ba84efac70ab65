#include "sft/sft_moe_tp.h"

#include <algorithm>

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

void AMX_SFT_MOE_TP::for_adapters(const BlockTask& task, FunctionRef<void(const BlockTask&)> function) const {
  const RoutingPlan& plan = pass_->plan();
  if (plan.adapted.empty()) return function(task);
  const size_t begin = pass_->first_row(task) - task.m0;
  BlockTask part = task;
  for (part.m0 = task.m0; part.m0 < task.m1; part.m0 = part.m1) {
    const RoutingPlan::AdapterRows& rows = plan.adapted_at(begin + part.m0);
    part.m1 = std::min(task.m1, static_cast<uint32_t>(rows.begin + rows.rows - begin));
    function(part);
  }
}

void AMX_SFT_MOE_TP::activate(LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
                              const kernels::ActivateArgs& act) {
  if (pass_ == nullptr) return Base::activate(call, scratch, task, act);
  for_adapters(task, [&](const BlockTask& part) {
    kernels::ActivateArgs own = act;
    const RowsAdapter adapter = pass_->adapter_of(part);
    const size_t at = c_offset(call, task, part);
    own.c_gate += at;
    if (own.c_up) own.c_up += at;
    own.h.rows = part.m1 - part.m0;
    own.kept = kept_rows(call, part, part.n0);
    if (adapter.rank != 0) {
      own.lora_scale = adapter.scale;
      own.l_gate = adapter_output(*pass_, scratch, part, 0, 0, LoraId::kGateB);
      if (pass_->gated()) own.l_up = adapter_output(*pass_, scratch, part, 1, 1, LoraId::kUpB);
    }
    Base::activate(call, scratch, part, own);
  });
}

kernels::KeptRows AMX_SFT_MOE_TP::kept_rows(const LayerCall& call, const BlockTask& task,
                                            uint32_t column) const {
  if (pass_ == nullptr) return Base::kept_rows(call, task, column);
  return kept_from(pass_->cache->rows.kept, pass_->first_row(task), column);
}

bool AMX_SFT_MOE_TP::has_adapter(const BlockTask& task) const {
  if (pass_ == nullptr) return false;
  bool found = false;
  for_adapters(task, [&](const BlockTask& part) { found |= pass_->adapter_of(part).rank != 0; });
  return found;
}

void AMX_SFT_MOE_TP::store(LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
                           const kernels::StoreRowsArgs& store) {
  if (pass_ == nullptr) return Base::store(call, scratch, task, store);
  for_adapters(task, [&](const BlockTask& part) {
    kernels::StoreRowsArgs own = store;
    const RowsAdapter adapter = pass_->adapter_of(part);
    own.c += c_offset(call, task, part);
    own.m = part.m1 - part.m0;
    own.y = static_cast<float*>(own.y) + size_t{part.m0 - task.m0} * own.y_stride;
    if (adapter.rank != 0) {
      own.lora_scale = adapter.scale;
      own.l = adapter_output(*pass_, scratch, part, 0, 2, LoraId::kDownB);
    }
    Base::store(call, scratch, part, own);
  });
}

}  // namespace ktmoe
