// A node's share of a layer for training: the base's steps with adapters, and the two steps of the backward
// pass whose outputs are cut between parts. Without a training pass it computes inference.
#pragma once

#include <cstddef>
#include <vector>

#include "core/function_ref.h"
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

  void activate(LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
                const kernels::ActivateArgs& act);
  kernels::KeptRows kept_rows(const LayerCall& call, const BlockTask& task, uint32_t column) const;
  bool has_adapter(const BlockTask& task) const;
  void store(LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
             const kernels::StoreRowsArgs& store);

  // The parts of a task whose rows have one adapter: function(part).
  void for_adapters(const BlockTask& task, FunctionRef<void(const BlockTask&)> function) const;
  // Where the results of a part begin in those of the task.
  static size_t c_offset(const LayerCall& call, const BlockTask& task, const BlockTask& part) {
    return call.kernels->c_floats(part.m0 - task.m0, task.n1 - task.n0);
  }

  TrainingPass* pass_ = nullptr;
  std::vector<BlockTask> tasks_;  // of the current step of the backward pass
};

}  // namespace ktmoe
