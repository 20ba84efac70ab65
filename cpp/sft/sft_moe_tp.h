// A node's share of a layer that trains: the base's steps with adapters, and the two steps of the backward
// pass that are shared out by outputs. Without a training pass it is the layer for inference.
#pragma once

#include "moe/layer/moe_base.h"
#include "sft/backward_activation.h"
#include "sft/backward_input.h"
#include "sft/forward_adapters.h"

namespace ktmoe {

class AMX_SFT_MOE_TP : public AMX_MOE_BASE<AMX_SFT_MOE_TP> {
  using Base = AMX_MOE_BASE<AMX_SFT_MOE_TP>;
  friend Base;

 public:
  using Base::Base;

  void set_pass(TrainingPass* pass) { pass_ = pass; }

  // ---- steps of the backward pass ----

  void cut_activation(const LayerCall& call, int num_threads) {
    cut_panels(call.plan, intermediate_, static_cast<uint32_t>(config_.hidden_size), num_threads, tasks_,
               backward_width());
  }
  // Columns of pass `i` of `passes`.
  void cut_input(const LayerCall& call, int num_threads, uint32_t i, uint32_t passes) {
    begin_pass(call, num_threads, i, passes);
    cut_panels(call.plan, pass_columns(), 2 * static_cast<uint32_t>(config_.intermediate_size), num_threads,
               tasks_, backward_width());
  }
  uint32_t num_backward() const { return static_cast<uint32_t>(tasks_.size()); }

  void activation(uint32_t worker, uint32_t task) {
    backward_activation(*pass_, pass_->backward[worker], tasks_[task]);
  }
  void input(uint32_t worker, uint32_t task) {
    backward_input(*pass_, pass_->backward[worker], tasks_[task], pass_columns(), pass_y());
  }

 private:
  BlockWidth backward_width() const { return {kernels::kOutputBlock, pass_->rows.columns, 8}; }

  // ---- hooks of the base ----

  void before_activation(LayerCall&, WorkerScratch& scratch, const PanelTask& task,
                         kernels::ActivateArgs& act) {
    if (pass_ == nullptr || pass_->rank() == 0) return;
    act.lora_scale = pass_->lora_scale;
    act.l_gate = adapter_output(*pass_, scratch, task, 0, 0, LoraId::kGateB);
    if (pass_->gated()) act.l_up = adapter_output(*pass_, scratch, task, 1, 1, LoraId::kUpB);
  }

  kernels::KeptRows kept_rows(const LayerCall& call, const PanelTask& task, uint32_t column) const {
    if (pass_ == nullptr) return Base::kept_rows(call, task, column);
    return kept_from(pass_->cache->rows.kept, pass_->first_row(task), column);
  }

  bool adds_to_down() const { return pass_ != nullptr && pass_->rank() != 0; }
  void before_store(LayerCall&, WorkerScratch& scratch, const PanelTask& task,
                    kernels::StoreRowsArgs& store) {
    if (!adds_to_down()) return;
    store.lora_scale = pass_->lora_scale;
    store.l = adapter_output(*pass_, scratch, task, 0, 2, LoraId::kDownB);
  }

  TrainingPass* pass_ = nullptr;
  std::vector<PanelTask> tasks_;  // of the current step of the backward pass
};

}  // namespace ktmoe
