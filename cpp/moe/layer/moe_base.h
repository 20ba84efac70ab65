// A node's share of an expert layer, and the steps of its forward pass:
//
//   gate_up   gather and pack X | gate, up products | activation -> H
//   down      product of H
//   combine   slots of a token in order, one rounding
//
// Inference and training are the same steps. A derived class extends them through the hooks below, which the
// base calls by static dispatch (CRTP). The defaults do nothing.
#pragma once

#include <vector>

#include "moe/layer/gemm_kernel.h"
#include "moe/plan/layer_call.h"

namespace ktmoe {

// Defined in moe_base-inl.h, which is compiled where a part is: moe_tp.cpp and sft_moe_tp.cpp.
template <class Derived>
class AMX_MOE_BASE {
 public:
  // The outputs of gate and up, and of down, that this part computes.
  AMX_MOE_BASE(const GeneralMOEConfig& config, const GemmKernel& kernel, const OutputShare& share)
      : config_(config), kernel_(kernel), intermediate_(share.intermediate), hidden_(share.hidden) {}

  // The matrices have at least the rows of the share; biases are the whole layer's.
  void set_weights(const ExpertMatrices* matrices, const ExpertBiases* biases) {
    matrices_ = matrices;
    biases_ = biases;
  }

  void cut_gate_up(const LayerCall& call, int num_threads);
  // The columns of one of several sweeps over the hidden size.
  void cut_down(const LayerCall& call, int num_threads, uint32_t sweep, uint32_t sweeps);
  // Cuts the combination alone, which ends every sweep over the columns.
  void begin_sweep(const LayerCall& call, int num_threads, uint32_t sweep, uint32_t sweeps);
  uint32_t num_gate_up() const { return static_cast<uint32_t>(gate_up_tasks_.size()); }
  uint32_t num_down() const { return static_cast<uint32_t>(down_tasks_.size()); }
  uint32_t num_combine() const { return static_cast<uint32_t>(combine_tasks_.size()); }

  // Memory for the results of the down projection: rows x the columns of the widest sweep.
  void set_y(float* y) { sweep_.y = y; }

  void gate_up(LayerCall& call, WorkerScratch& scratch, uint32_t task_index);
  void down(LayerCall& call, WorkerScratch& scratch, uint32_t task_index);
  void combine(const LayerCall& call, uint32_t task_index);

  // ---- hooks ----
  // Gate and up are in scratch.c_gate and c_up.
  void activate(LayerCall& call, WorkerScratch&, const BlockTask&, const kernels::ActivateArgs& act) {
    call.kernels->activate(act);
  }
  // Row-major memory for the activation's results from a column on, instead of an operand; integer products
  // need it.
  kernels::KeptRows kept_rows(const LayerCall& call, const BlockTask& task, uint32_t column) const;
  // The product with the down projection is in scratch.c_gate, at least if has_adapter() says so.
  bool has_adapter(const BlockTask&) const { return false; }
  void store(LayerCall& call, WorkerScratch&, const BlockTask&, const kernels::StoreRowsArgs& store) {
    call.kernels->store_rows(store);
  }

 protected:
  // Blocks whose results can be read from any row on may have rows with different adapters.
  static BlockAdapters adapters_of_blocks(const LayerCall& call) {
    return call.kernels->c_is_rows ? BlockAdapters::kAny : BlockAdapters::kOne;
  }
  // The columns of the current sweep.
  Span sweep_columns() const { return sweep_.columns; }
  float* sweep_y() const { return sweep_.y; }

  const GeneralMOEConfig& config_;
  const GemmKernel& kernel_;
  const Span intermediate_, hidden_;

 private:
  Derived& derived() { return static_cast<Derived&>(*this); }

  // The task's columns of the rows of its tokens' slots, where they are not summed.
  void copy_expert_rows(const LayerCall& call, const BlockTask& task) const;

  // The first of the task's rows in the plan.
  static size_t first_row(const LayerCall& call, const BlockTask& task) {
    return size_t{call.plan.active[task.active].begin} + task.m0;
  }

  // Rows in int8 blocks as an operand: those of the index, or of the plan.
  static kernels::Operand blocks_operand(const LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
                                         const std::byte* rows, const int32_t* index, uint32_t k,
                                         uint32_t block);
  // The inputs as an operand, in int8 blocks or, if block is 0, as the kernel of the layer has them.
  kernels::Operand hidden_operand(const LayerCall& call, WorkerScratch& scratch, const BlockTask& task,
                                  uint32_t block);
  // Where the activation writes its operand: nowhere when it keeps rows.
  kernels::Operand intermediate(const LayerCall& call, const BlockTask& task,
                                const kernels::KeptRows& kept) const;
  // The intermediate as an operand of the down projection.
  kernels::Operand down_operand(const LayerCall& call, WorkerScratch& scratch, const BlockTask& task);
  void product(const LayerCall& call, const WorkerScratch& scratch, const kernels::Operand& x, uint32_t block,
               const WeightView& w, const BlockTask& task, const std::byte* next_rows, float* c,
               size_t c_stride = 0);
  // Where the task after this one begins in its matrix, or null: a worker mostly takes it next.
  static const std::byte* first_row_of_next(const LayerCall& call, const std::vector<BlockTask>& tasks,
                                            uint32_t task_index, const std::vector<WeightView>& matrices);

  const ExpertMatrices* matrices_ = nullptr;
  const ExpertBiases* biases_ = nullptr;
  std::vector<BlockTask> gate_up_tasks_, down_tasks_, combine_tasks_;
  ColumnSweep sweep_;
};

}  // namespace ktmoe
