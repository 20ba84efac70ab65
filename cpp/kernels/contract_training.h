// The contract of the kernels that training adds: products that sum over a weight's rows (NN) and over tokens
// (TN), and the derivative of the activation. Letters and the rule of invariance are those of contract.h:
// every sum is taken in an order that depends on its length and the instruction set alone.
#pragma once

#include <span>

#include "kernels/contract.h"

namespace ktmoe::kernels {

// The most columns that one NN call takes.
inline constexpr uint32_t kMaxNnColumns = 1024;
// The most rows and columns of D that one TN call takes.
inline constexpr uint32_t kMaxTnRows = 64, kMaxTnColumns = 256;

// The lhs operands of NN, rows G [M, N] in the layout that the instruction set multiplies from:
//   pack_lhs             uses the rows in place if possible, else packs them into lhs_bytes(m, n)
//   pack_lhs_in_place    packs m rows with stride round_up(n, kOutputBlock) into their own memory, using
//                        scratch of lhs_bytes(m, n); afterwards they are no longer rows
//   lhs_in_place         the operand that results from that

// A term of a sum of products: sum over n in [n0, n1) of G[m, n] W[n, k].
struct NnTerm {
  Operand g;                // a lhs operand of M rows
  uint32_t n0 = 0, n1 = 0;  // n0 a multiple of kOutputBlock
  WeightView w;             // its row 0 is row n0; terms may differ in format
  uint32_t size() const { return n1 - n0; }
};

// NN: C[m, k - k0] (+)= sum over terms of sum_n G[m, n] W[n, k] for k in [k0, k1), in fp32: gradients go back
// through weights, whose rows are read in place. The sum is sequential, along n and from term to term: cut
// between terms, or at a multiple of kOutputBlock rows of a W, with the second part accumulating, it has the
// same bits. Preconditions: at least one term, none of them empty, M <= kMaxCallRows the same in
// all, k0 a multiple of kOutputBlock, k1 - k0 <= kMaxNnColumns, scratch of nn_scratch_bytes() aligned
// to 64 bytes. Only elements [k0, k1) of each row of W are read.
struct NnArgs {
  std::span<const NnTerm> terms;
  uint32_t k0 = 0, k1 = 0;
  float* c = nullptr;
  size_t c_stride = 0;  // floats from row to row
  bool accumulate = false;
  // Columns of the first rows that the caller will multiply by next: prefetched meanwhile. Null data: none.
  WeightView next_w;
  uint32_t next_n = 0, next_k0 = 0, next_k1 = 0;
  std::byte* scratch = nullptr;
};

// TN: D[n, k] (+)= scale * sum_m G[m, n] X[m, k] in fp32: the gradient of a weight. D[n, k] is at
// d[n * n_stride + k * k_stride], so that the transpose is a matter of strides. Any M, 0 included; the sum is
// scaled once, when it is complete.
// Preconditions: n <= kMaxTnRows, k <= kMaxTnColumns, scratch of tn_scratch_bytes() aligned to 64 bytes.
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
