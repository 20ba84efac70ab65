// Memory layouts of a training pass: in a cache's own memory, or in borrowed scratch. The constructor of a
// plan requests memory; place() makes pointers once it is allocated.
#pragma once

#include <cstddef>

#include "moe/plan/scratch_plan.h"
#include "sft/training_pass.h"

namespace ktmoe {

// The rows that a forward pass saves for the backward pass or, without gate and up, needs only itself.
class RowsPlan {
 public:
  RowsPlan(const MOESFTConfig& config, size_t rows, uint32_t rank, bool for_backward, ScratchPlan& plan);
  CachedRows place(std::byte* base) const;

 private:
  const MOESFTConfig& config_;
  bool for_backward_;
  size_t gate_ = 0, up_ = 0, h_, lora_hidden_[3];
};

// What a cache has whether or not its rows are saved.
class InputPlan {
 public:
  InputPlan(const MOESFTConfig& config, size_t tokens, size_t rows, bool drops, ScratchPlan& plan);
  void place(std::byte* base, ForwardCache& cache) const;

 private:
  bool drops_, scales_ = false;
  size_t hidden_ = 0, weight_ = 0, input_weight_ = 0, mask_x_ = 0, mask_h_ = 0;
};

// Every worker's scratch of a forward pass.
class ForwardWorkersPlan {
 public:
  ForwardWorkersPlan(const TrainingPass& pass, uint32_t rows_of_x, uint32_t rows_of_h, size_t workers,
                     ScratchPlan& plan);
  void place(std::byte* base, TrainingPass& pass) const;

 private:
  size_t workers_, per_worker_, begin_;
  size_t operand_, c_[4], nt_, lora_hidden_[2], dropped_ = 0;
  bool drops_;
};

// The rows that the backward pass computes, and every worker's scratch. dg and du overwrite g and u when
// these are bf16.
class BackwardPlan {
 public:
  BackwardPlan(const TrainingPass& pass, uint32_t most_rows, size_t workers, ScratchPlan& plan);
  void place(std::byte* base, TrainingPass& pass) const;

 private:
  size_t workers_, per_worker_, begin_;
  bool in_place_, separate_l_, scales_;
  uint32_t columns_, blocks_, input_blocks_;
  size_t rank_rows_[5], inter_rows_[2], grad_weight_, grad_input_weight_ = 0;
  size_t lhs_, c_, l_, products_, chunk_;
};

}  // namespace ktmoe
