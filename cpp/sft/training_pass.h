// The data of the steps of a training pass: the layer, the cache of the forward pass, and scratch.
//
// Symbols, here and in backward_*.h. bf() rounds to bf16; a row belongs to one token of one expert.
//
//   x           [H]   input of the expert
//   g, u        [I]   gate and up, with biases and adapters: the inputs of the activation
//   h           [I]   bf(act(g, u)), the intermediate
//   w                 the routing weight of the row
//   q           [H]   dY, the gradient of the layer's output, of the row's token
//   s                 the scale of the adapters
//   A, B              an adapter's matrices [R, K] and [N, R], with g, u, d for gate, up, down: Ag, Bg, ...
//   ug, uu, ud  [R]   LoRA hidden states of gate, up, down: bf(x A^T)
//   r           [R]   bf(q Bd), the gradient of ud before s and w
//   z           [I]   the gradient of h before w
//   dg, du      [I]   the gradients of g and u
//   dug, duu    [R]   the gradients of ug and uu
//   dx          [H]   the gradient of x
#pragma once

#include <span>
#include <vector>

#include "kernels/contract_training.h"
#include "moe/layer/gemm_kernel.h"
#include "moe/plan/layer_call.h"
#include "sft/dropout.h"
#include "sft/forward_cache.h"
#include "sft/interface.h"

namespace ktmoe {

// A worker's scratch in the forward pass, beside its WorkerScratch.
struct ForwardScratch {
  PackedRows lora_hidden[2];  // ug (or ud) and uu as operands
  std::byte* lora_hidden_operand[2] = {};
  float* l[2] = {};         // C blocks: the outputs of the adapters
  bf16* dropped = nullptr;  // rows of x or h after dropout; null without
};

// Rows as an lhs operand, packed again only when the expert or the rows change.
struct PackedLhs {
  uint32_t active = UINT32_MAX;
  uint32_t m0 = 0;
  kernels::Operand operand;

  const kernels::Operand& pack_once(const kernels::KernelTable& table, const kernels::RowsView& rows,
                                    const BlockTask& task, uint32_t n, std::byte* memory);
};

// A worker's scratch in the backward pass.
struct BackwardScratch {
  PackedLhs packed;
  std::byte* lhs = nullptr;  // memory of an lhs operand
  std::vector<kernels::NnTerm> terms;
  float* c = nullptr;             // rows x BackwardRows::columns
  float* l = nullptr;             // the same, of the adapters
  std::byte* products = nullptr;  // scratch of NN and TN products
  bf16* chunk = nullptr;          // kChunkRows x kMaxTnColumns: scaled or masked rows of a TN product
};
inline constexpr uint32_t kChunkRows = 512;

// The rows of the weight matrices on one node; all segments together are the layer's matrices.
struct WeightSegment {
  OutputShare rows;
  const ExpertMatrices* matrices = nullptr;
};

// Intermediate results of the backward pass, by rows of the plan. dg and du replace g and u wherever these
// have the same type. Rows that are packed in place as lhs operands (kernels/contract_training.h)
// have row stride inter_stride() or rank_stride().
struct BackwardRows {
  bf16* r = nullptr;                                  // bf(q Bd) [rows, R]; s r where that is exact
  bf16* weighted_r = nullptr;                         // bf(s w r) [rows, R], row stride R
  bf16* weighted_ud = nullptr;                        // bf(w ud), likewise
  bf16 *d_gate = nullptr, *d_up = nullptr;            // dg, du [rows, I]
  bf16 *d_lora_gate = nullptr, *d_lora_up = nullptr;  // dug, duu [rows, R]
  float* grad_weight = nullptr;  // [rows, blocks]: <z, h> over each block of columns, and <q, down_bias> last
  // Where routing weights scale the inputs, used instead: <dx, x> over each block of columns of H.
  float* grad_input_weight = nullptr;  // [rows, input_blocks]
  uint32_t input_blocks = 0;
  uint32_t columns = 0;  // the most columns of one NN product
  uint32_t blocks = 0;   // blocks of columns, and one for the bias
};

// Row stride, in elements, of rows that are packed in place as lhs operands.
inline size_t lhs_stride(uint32_t width) { return round_up(width, kernels::kOutputBlock); }

// The adapters that rows are computed with: those of a layer, or of a batch's tokens.
struct RowsAdapter {
  const LoraWeights* weights = nullptr;
  uint32_t rank = 0;  // 0: none
  float scale = 0;
};

struct TrainingPass {
  const MOESFTConfig* config = nullptr;
  GemmKernel kernel = GemmKernel224BF;  // of the base weights
  LayerCall* call = nullptr;            // routing plan, kernels, the forward pass's arrays and scratch
  ForwardCache* cache = nullptr;
  float lora_scale = 0;
  std::vector<ForwardScratch> forward;  // by worker
  // Of an inference pass whose tokens name their adapters, all that exist, by number; and the largest rank.
  const std::vector<RowsAdapter>* named = nullptr;
  uint32_t most_rank = 0;

  // backward
  const BackwardArgs* args = nullptr;
  std::vector<WeightSegment> segments;
  const ExpertBiases* biases = nullptr;
  const std::vector<uint32_t>* logical = nullptr;  // see ExpertWeights
  BackwardRows rows;
  std::vector<BackwardScratch> backward;

  const kernels::KernelTable& kernels() const { return *call->kernels; }
  const RoutingPlan& plan() const { return call->plan; }
  const RoutingPlan::ExpertRows& expert(const BlockTask& task) const { return plan().active[task.active]; }
  size_t first_row(const BlockTask& task) const { return size_t{expert(task).begin} + task.m0; }
  const int32_t* tokens(const BlockTask& task) const { return plan().token.data() + first_row(task); }
  uint32_t hidden() const { return static_cast<uint32_t>(config->hidden_size); }
  uint32_t inter() const { return static_cast<uint32_t>(config->intermediate_size); }
  uint32_t rank() const { return static_cast<uint32_t>(config->lora_rank); }
  size_t inter_stride() const { return lhs_stride(inter()); }
  size_t rank_stride() const { return lhs_stride(rank()); }
  bool gated() const { return config->activation.gated; }
  size_t logical_expert(size_t e) const { return logical->empty() ? e : (*logical)[e]; }

  // A bf16 matrix by rows of the plan, from `row` on.
  kernels::RowsView rows_from(const bf16* matrix, size_t stride, size_t row) const {
    return {matrix + row * stride, stride, nullptr};
  }
  // Whether s is a power of two, so that s x is exact in bf16: scaled adapters then need no separate product.
  bool scale_is_exact() const;
  // Of a task whose rows have one.
  RowsAdapter adapter_of(const BlockTask& task) const;
  WeightView adapter(LoraId id, const BlockTask& task) const;
};

MaskView mask_of_x(const TrainingPass& pass);
MaskView mask_of_h(const TrainingPass& pass);

// Columns of rows after dropout, row after row in `to`. Row m belongs to token tokens[m].
void copy_dropped(const kernels::KernelTable& kernels, const kernels::RowsView& source, const int32_t* tokens,
                  uint32_t rows, Span columns, const MaskView& mask, bf16* to);

}  // namespace ktmoe
