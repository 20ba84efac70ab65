// A layer of experts for training, over all sub-pools of an engine.
//
// forward     copy the input | ug, uu | gate, up, activation | ud | down, combine
// backward    r | z, dg, du | dug, duu | gradients of matrices | (dg, du to lhs operands) | dx, combine
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "moe/layer/tp_moe_common.h"
#include "sft/backward_weights.h"
#include "sft/cache_stack.h"
#include "sft/sft_moe_tp.h"

namespace ktmoe {

extern template class TP_MOE_Common<AMX_SFT_MOE_TP, MoE_SFT_Interface>;

class TP_MOE_SFT : public TP_MOE_Common<AMX_SFT_MOE_TP, MoE_SFT_Interface> {
  using Part = AMX_SFT_MOE_TP;
  using Common = TP_MOE_Common<Part, MoE_SFT_Interface>;

 public:
  // Adapters start as copies of the given sources, or as zeros.
  TP_MOE_SFT(MOESFTConfig config, GemmKernel kernel, const LoraSources& lora = {});

  const MOESFTConfig& sft_config() const override { return sft_config_; }
  size_t num_cached() const override { return caches_->size(); }
  size_t cache_bytes() const override { return caches_->bytes(); }
  void clear_cache() override;
  uint32_t step() const override { return caches_->step(); }
  void set_step(uint32_t step) override { caches_->set_step(step); }
  std::shared_ptr<TrainingCall> new_call() override { return std::make_shared<TrainingCall>(caches_); }

  // Tokens may name adapters, in place of those that are trained.
  void forward(const ForwardArgs& args) override;
  void set_adapter(uint32_t number, const LoraSources& sources, const MOESFTConfig& config) override;
  void remove_adapter(uint32_t number) override;

  void update_lora_weights(const LoraSources& sources) override;
  void forget_forwards() override;
  bool is_last(uint32_t caller_id, uint32_t num_tokens) override;
  void forward_sft(const ForwardArgs& args, bool save, uint32_t caller_id = 0,
                   TrainingCall* call = nullptr) override;
  void backward(const BackwardArgs& args, TrainingCall* call = nullptr) override;

 protected:
  void check_before_load() override;

 private:
  // Sets the training pass of all parts for the length of a scope.
  class Training {
   public:
    Training(TP_MOE_SFT& layer, TrainingPass& pass);
    ~Training();
    Training(const Training&) = delete;
    Training& operator=(const Training&) = delete;

   private:
    TP_MOE_SFT& layer_;
  };

  TrainingPass make_pass(ForwardCache& cache);
  // The largest rank of the adapters of a call; its plan is made.
  uint32_t most_rank(const ForwardArgs& args) const;
  // Borrowed memory for the rows of a cache that does not save them.
  ScratchPool::Lease lease_rows(ForwardCache& cache, uint32_t rank, bool for_backward);
  // Blocks of rows of all active experts, for operands of k inputs.
  std::vector<BlockTask> row_blocks(uint32_t k) const;

  // ---- forward ----

  // Allocates a cache and copies the inputs of the pass into it.
  void fill_input(const ForwardArgs& args, bool save, ForwardCache& cache);
  void fill_token(const ForwardArgs& args, uint32_t t, ForwardCache& cache) const;
  // The layer on the cache's input. `to_the_end` false: only the values for the backward pass.
  void run_forward(const ForwardArgs& args, ForwardCache& cache, bool to_the_end);
  using LoraHiddenStep = void (*)(TrainingPass&, WorkerScratch&, const BlockTask&);
  void run_lora_hidden(TrainingPass& pass, uint32_t k, LoraHiddenStep step);
  // Invalidates the packed operands of workers, before a step on another matrix.
  void invalidate_packed(TrainingPass& pass);

  // ---- backward (tp_moe_sft_backward.cpp) ----

  void run_backward(const BackwardArgs& args, ForwardCache& cache);
  using BackwardStep = void (*)(TrainingPass&, BackwardScratch&, const BlockTask&);
  void run_step(Phase phase, TrainingPass& pass, uint32_t k, BackwardStep step);
  void run_activation();
  void run_weight_gradients(TrainingPass& pass, const std::vector<WeightGradient>& gradients);
  void run_input(uint32_t sweeps);
  // The gradient of a routing weight: the sum over the blocks of its row, in order.
  void run_grad_weights(const TrainingPass& pass);

  const MOESFTConfig sft_config_;
  std::shared_ptr<LoraWeights> lora_;
  const std::shared_ptr<CacheStack> caches_;
  std::vector<std::unique_ptr<LoraWeights>> named_weights_;
  std::vector<RowsAdapter> named_;  // by number; of rank 0 where there is none
};

}  // namespace ktmoe
