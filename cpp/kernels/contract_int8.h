// Products of encoded weights with activations in int8: the contract. They are part of KernelTable.
//
// A row x[K] is cut into blocks of `block` values (activation_block<F>()), the last may be shorter:
//
//   s_b = max |x| / 127        code = rint(x / s_b), from -127 to 127; zeros where s_b is 0
//   a block with a value that is not finite has an s_b of NaN and codes of 0
//
// A weight is w = w_s i + w_m with an integer i of the format. Every output has one float32 accumulator, to
// which groups of weights that share w_s and w_m are added in ascending K; groups longer than a block are
// cut:
//
//   acc = fma(f32(w_s s_b), f32(S), acc)      S = sum of i code
//   acc = fma(f32(w_m s_b), f32(M), acc)      M = sum of code, for formats with offsets
//
// In blocks of 256 values whose groups have integer scales, those are part of i, the integers of their
// offsets part of M, and the block is the group. S and M are exact in int32, and every sum is converted and
// every factor rounded once, so all instruction sets give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/align.h"
#include "formats/format.h"

namespace ktmoe::kernels {

// Where a row in int8 has what:
//   [codes, zeros behind them: padded][sums of 16 codes: int16][sums of 32 codes: int16][s_b: float32]
struct BlockRowLayout {
  uint32_t padded, block;

  constexpr BlockRowLayout(uint32_t k, uint32_t block)
      : padded(static_cast<uint32_t>(round_up(k, block))), block(block) {}
  constexpr size_t sums16() const { return padded; }
  constexpr size_t sums32() const { return sums16() + padded / 16 * sizeof(int16_t); }
  constexpr size_t scales() const { return sums32() + padded / 32 * sizeof(int16_t); }
  constexpr size_t stride() const { return round_up(scales() + padded / block * sizeof(float), kCacheLine); }
};

// A row in that layout.
struct BlockRow {
  const std::byte* codes;
  const int16_t *sums16, *sums32;
  const float* scales;

  BlockRow() = default;
  BlockRow(const std::byte* row, const BlockRowLayout& layout)
      : codes(row),
        sums16(reinterpret_cast<const int16_t*>(row + layout.sums16())),
        sums32(reinterpret_cast<const int16_t*>(row + layout.sums32())),
        scales(reinterpret_cast<const float*>(row + layout.scales())) {}
};

}  // namespace ktmoe::kernels
