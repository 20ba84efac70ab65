// A node's share of a layer for training: the base's steps with adapters, and the two steps of the backward
// pass whose outputs are cut between parts. Without a training pass it computes inference.
#pragma once

#include <vector>

#include "moe/layer/moe_base.h"
#include "sft/training_pass.h"

namespace ktmoe {

class AMX_SFT_MOE_TP;
extern template class AMX_MOE_BASE<AMX_SFT_MOE_TP>;

class AMX_SFT_MOE_TP : public AMX_MOE_BASE<AMX_SFT_MOE_TP> {
  using Base = AMX_MOE_BASE<AMX_SFT_MOE_TP>;
  friend Base;

 public:
  using Base::Base;

  void set_pass(TrainingPass* pass) { pass_ = pass; }

  // ---- steps of the backward pass ----

  void cut_activation(const LayerCall& call, int num_threads);
  // Columns of pass `i` of `passes`.
  void cut_input(const LayerCall& call, int num_threads, uint32_t i, uint32_t sweeps);
  uint32_t num_backward() const { return static_cast<uint32_t>(tasks_.size()); }

  void activation(uint32_t worker, uint32_t task);
  void input(uint32_t worker, uint32_t task);

 private:
  BlockWidth backward_width() const { return {kernels::kOutputBlock, pass_->rows.columns, 8}; }

  // ---- hooks of the base ----

  void before_activation(LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
                         kernels::ActivateArgs& act);
  kernels::KeptRows kept_rows(const LayerCall& call, const BlockTask& task, uint32_t column) const;
  bool has_adapter(const BlockTask& task) const {
    return pass_ != nullptr && pass_->adapter_of(task).rank != 0;
  }
  void before_store(LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
                    kernels::StoreRowsArgs& store);

  TrainingPass* pass_ = nullptr;
  std::vector<BlockTask> tasks_;  // of the current step of the backward pass
};

}  // namespace ktmoe
