// The contract of the kernels that quantize weights. What they compute is stated by the reference
// (quantize_int8, quantize_int4): a fixed sequence of fp32 operations, none of them fused, with sums in 16
// lanes whatever the width of the vectors. So, unlike products, codes and scales are the same to the bit on
// every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/contract.h"

namespace ktmoe::kernels {

// Rows [n, k] of finite floats to rows of bytes. Output of each kernel per row:
//   quantize_int8        k int8 codes; channel_scale
//   quantize_int8_group  k int8 codes, then ceil(k / 32) fp32 scales, at any address, found by search
//   quantize_int4        ceil(k / 2) bytes of codes in -8..7, two per byte, the first in the low four bits,
//                        zero bits after the last of an odd k; then ceil(k / group) int8 multipliers;
//                        channel_scale
// Each returns the first row with NaN or infinity, or n. Rows before it are written, the others are not.
// Preconditions: n and k below 2^31; the bytes of a row fit codes_stride; outputs share no memory with rows.
struct QuantizeArgs {
  const void* rows = nullptr;  // at any address
  FloatType type = FloatType::kBf16;
  ptrdiff_t stride = 0;  // elements from row to row
  uint32_t n = 0, k = 0;
  uint32_t group = 32;  // of quantize_int4: 32, 64 or 128
  std::byte* codes = nullptr;
  size_t codes_stride = 0;         // bytes from row to row
  float* channel_scale = nullptr;  // [n]; null for quantize_int8_group
};

}  // namespace ktmoe::kernels
