// The contract of the kernels that work on one row, element by element. They round and add as scalar code
// does, in an order that depends on the length of the row alone: every instruction set gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace ktmoe::kernels {

// Identifies a dropout mask; the reference module states how its elements are drawn (Philox4x32-10).
struct DropoutKey {
  uint64_t seed = 0;
  uint32_t step = 0;
  uint32_t layer = 0;
  uint32_t which = 0;  // 0: the input of gate and up, 1: that of down
  double rate = 0;
};

// Bytes of the mask bits of one token.
inline size_t mask_row_bytes(uint32_t features) { return (size_t{features} + 7) / 8; }

struct ElementwiseKernels {
  // to = x; all NaN when any element is not finite.
  void (*copy_finite)(const bf16* x, size_t size, bf16* to);
  // to = bf(w x). `to` may be `x`.
  void (*scale)(const bf16* x, float w, size_t size, bf16* to);
  // to = bf(w x); all NaN when any element of that is not finite.
  void (*scale_finite)(const bf16* x, float w, size_t size, bf16* to);
  // to = bf(w x)
  void (*round_scaled)(const float* x, float w, size_t size, bf16* to);
  // to = x
  void (*widen)(const bf16* x, size_t size, float* to);
  // to = bf(x)
  void (*round)(const float* x, size_t size, bf16* to);
  // to += x
  void (*add)(const float* x, size_t size, float* to);

  // The sum of x[i] y[i], element after element.
  float (*dot)(const bf16* x, const float* y, size_t size);
  // blocks[b] = sum of x y over the elements of block b, kOutputBlock wide.
  void (*dot_blocks)(const float* x, const bf16* y, size_t size, float* blocks);
  // The sum of x[i], element after element.
  float (*sum)(const float* x, size_t size);

  // Bit f of `bits` says whether feature f of a token is kept. Writes mask_row_bytes(features) bytes.
  void (*draw_mask)(const DropoutKey& key, uint32_t token, uint32_t features, uint8_t* bits);
  // to[i] = x[i], or 0 where bit first + i is not set. `to` may be `x`.
  void (*mask_bf16)(const bf16* x, const uint8_t* bits, uint32_t first, uint32_t size, bf16* to);
  void (*mask_float)(const float* x, const uint8_t* bits, uint32_t first, uint32_t size, float* to);
};

}  // namespace ktmoe::kernels
