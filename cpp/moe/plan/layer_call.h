// The data of one forward pass of a layer: the caller's arrays, the routing, and the borrowed scratch.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <vector>

#include "moe/layer/activation_dtype.h"
#include "moe/layer/interface.h"
#include "moe/plan/block_tasks.h"
#include "moe/plan/routing_plan.h"

namespace ktmoe {

// The activations that a worker packed last: consecutive tasks of an expert share them.
struct PackedRows {
  uint32_t active = UINT32_MAX;
  uint32_t m0 = 0;
  uint32_t block = 0;  // of rows in int8 blocks
  kernels::Operand operand;

  // The rows of a task as an operand, packed by pack() only when the expert or the rows change.
  template <class Pack>
  const kernels::Operand& pack_once(const BlockTask& task, Pack&& pack, uint32_t of_block = 0) {
    if (active == task.active && m0 == task.m0 && block == of_block) return operand;
    operand = pack();
    active = task.active, m0 = task.m0, block = of_block;
    return operand;
  }
  const kernels::Operand& pack_once(const kernels::KernelTable& table, const kernels::RowsView& rows,
                                    const BlockTask& task, uint32_t k, std::byte* memory) {
    return pack_once(task, [&] { return table.pack(rows, task.m1 - task.m0, k, memory); });
  }
  const kernels::Operand& pack_once(const kernels::KernelTable& table, const kernels::Int8Rows& rows,
                                    const int32_t* index, const BlockTask& task, uint32_t k,
                                    std::byte* memory) {
    return pack_once(task, [&] { return table.pack_int8(rows, index, task.m1 - task.m0, k, memory); });
  }
};

// A worker's own scratch.
struct WorkerScratch {
  uint32_t worker = 0;  // its number in the pool
  PackedRows packed;
  std::byte* operand = nullptr;  // packed activations
  float* c_gate = nullptr;       // C blocks
  float* c_up = nullptr;
  std::byte* nt = nullptr;  // of the product kernel
};

// The down projection computes a part's columns in several passes, so that its fp32 results stay in cache
// until they are combined. In each pass `columns` are in y, row after row.
struct ColumnSweep {
  Span columns;
  float* y = nullptr;
};

// Slots that are summed: out = base + the weighted rows of each token's slots.
struct SlotSum {
  const int32_t* row = nullptr;  // [T, P]: slot -> row of the plan, or -1 for a slot that is not
  const void* base = nullptr;
  kernels::FloatType base_type = kernels::FloatType::kFloat32;
  void* out = nullptr;
  kernels::FloatType out_type = kernels::FloatType::kBf16;
};

struct LayerCall {
  const kernels::KernelTable* kernels = nullptr;
  const GeneralMOEConfig* config = nullptr;
  const ForwardArgs* args = nullptr;
  RoutingPlan plan;
  std::vector<uint8_t> adapter_exists;   // by number: adapters that tokens may name
  const SlotSum* sum = nullptr;          // the one that is computed
  std::vector<size_t> first_expert_row;  // [T]: of each token, where expert_rows are asked for
  const float* weights = nullptr;        // [T, P]: the weight of each slot's row in the sum; null for ones
  bf16* scaled_x = nullptr;   // the inputs by rows of the plan, where the routing weights scale them
  std::vector<std::byte*> h;  // the intermediate of each active expert, an operand
  // For integer products instead, because a row can be quantized only when it is complete:
  bf16* h_rows = nullptr;    // the intermediate by rows of the plan, with row stride h_stride()
  kernels::Int8Rows x8, h8;  // the inputs, the intermediate by rows of the plan
  // For int8 block products: which projections have them, the inputs in blocks of 128 and of 256, and the
  // intermediate in those of the down projection.
  ActivationBlocks blocks;
  std::byte *x_blocks[2] = {}, *h_blocks = nullptr;
  std::vector<WorkerScratch> workers;

  // Where the inputs in such blocks are.
  std::byte*& x_in(uint32_t block) { return x_blocks[block == 256]; }
  std::byte* x_in(uint32_t block) const { return x_blocks[block == 256]; }

  // Whether the intermediate is rows of bf16 before it is quantized, as a block or row must be complete.
  bool keeps_h_rows(const GemmKernel& kernel) const { return kernel.is_integer || blocks.down != 0; }

  // Makes the plan. Throws std::out_of_range as RoutingPlan does.
  void plan_batch();
  // Throws std::invalid_argument unless the plan has that number of rows.
  void check_expert_rows(uint32_t num_expert_rows) const;
  // Fills first_expert_row for the plan.
  void number_expert_rows();
  // Of k columns, those that an NT product finishes before it goes on.
  uint32_t nt_block_k(uint32_t k) const { return std::min(k, kernels->nt_block_k); }
  // What enters the experts: one row per token, or one per row of the plan where inputs are scaled.
  kernels::RowsView inputs() const { return {scaled_x ? scaled_x : args->hidden_states, hidden(), nullptr}; }
  uint32_t num_inputs() const { return config->scale_inputs ? plan.num_rows() : args->num_tokens; }
  // Those of the rows of the plan from `row` on.
  kernels::RowsView inputs_from(size_t row) const {
    if (scaled_x) return {scaled_x + row * hidden(), hidden(), nullptr};
    return {args->hidden_states, hidden(), plan.token.data() + row};
  }
  // What is summed by it: two of a batch whose slots are split.
  std::span<const SlotSum> sums();

  size_t hidden() const { return static_cast<size_t>(config->hidden_size); }
  size_t h_stride() const {
    return round_up(static_cast<size_t>(config->intermediate_size), kernels::kOutputBlock);
  }

 private:
  std::array<SlotSum, 2> sums_;
  // Of a batch whose slots are split: all ids, which of them are deferred, and the rows of either part.
  std::vector<int64_t> all_ids_;
  std::vector<uint8_t> is_deferred_;
  std::vector<int32_t> rows_now_, rows_deferred_;
};

}  // namespace ktmoe
