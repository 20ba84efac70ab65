// The contract of the kernels that training adds: products that sum over a weight's rows (NN) and over tokens
// (TN), and the derivative of the activation. Letters and the rule of invariance are those of contract.h:
// every sum is taken in an order that depends on its length and the instruction set alone.
#pragma once

#include "kernels/contract.h"

namespace ktmoe::kernels {

// The widest block of columns that one NN or TN call takes.
inline constexpr uint32_t kMaxBlockColumns = 256;
// The most rows of D that one TN call takes.
inline constexpr uint32_t kMaxTnRows = 64;

// NN: C[m, k - k0] (+)= sum_n G[m, n] W[n, k] for k in [k0, k1), in fp32: a gradient goes back through a
// weight, whose rows are read as they lie. The sum over n is sequential: a product cut at a multiple of
// kOutputBlock rows of W, its second part accumulating, has the same bits as one in one piece. Preconditions:
// M <= kMaxPanelRows, k0 a multiple of kOutputBlock / 2, k1 - k0 <= kMaxBlockColumns, scratch of
// nn_scratch_bytes() aligned to 64 bytes. Only elements [k0, k1) of each row of W are read.
struct NnArgs {
  Operand g;  // of pack_left: M rows, N = g.k elements each
  WeightView w;
  uint32_t k0 = 0, k1 = 0;
  float* c = nullptr;
  size_t c_stride = 0;  // floats from row to row
  bool accumulate = false;
  // Columns of the first rows that the caller will multiply by next: asked for meanwhile. Null data: none.
  WeightView next_w;
  uint32_t next_n = 0, next_k0 = 0, next_k1 = 0;
  std::byte* scratch = nullptr;
};

// TN: D[n, k] (+)= scale * sum_m G[m, n] X[m, k] in fp32: the gradient of a weight. D[n, k] lies at
// d[n * n_stride + k * k_stride], so that the transpose is a matter of strides. Any M, 0 included; the sum is
// scaled once, when it is complete.
// Preconditions: n <= kMaxTnRows, k <= kMaxBlockColumns, scratch of tn_scratch_bytes() aligned to 64 bytes.
// The narrow matrix of the two should be G.
struct TnArgs {
  RowsView g;  // column 0 of D's rows first
  RowsView x;
  uint32_t m = 0, n = 0, k = 0;
  float scale = 1;
  float* d = nullptr;
  size_t n_stride = 0, k_stride = 0;  // floats
  bool accumulate = false;
  std::byte* scratch = nullptr;
};

// With z = Z + lora_scale L, gate, up and h as kept:
//   grad_weight[m, b] = sum of z h over the columns of block b, kOutputBlock wide
//   d_gate = bf16(weight[m] z d act / d gate)       d_up = bf16(weight[m] z d act / d up)
// At the boundary of a clamp the derivative counts as inside. Not gated: there is no up.
// d_gate and d_up may be the memory of kept.gate and kept.up when these are bf16. The first column is a
// multiple of kOutputBlock in the layer.
struct ActivateBackwardArgs {
  Activation activation;
  uint32_t m = 0, n = 0;  // rows, columns
  const float* z = nullptr;
  const float* l = nullptr;  // null for zero
  float lora_scale = 0;
  size_t z_stride = 0;            // floats, of both
  const float* weight = nullptr;  // [m]
  KeptRows kept;                  // first column of this call
  bf16* d_gate = nullptr;
  bf16* d_up = nullptr;
  size_t d_stride = 0;
  float* grad_weight = nullptr;  // [m, blocks], written
  size_t grad_weight_stride = 0;
};

}  // namespace ktmoe::kernels
