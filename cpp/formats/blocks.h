// Common to block formats, those of GGUF: a row is blocks of some values one after the other,
// each with its scales among its codes.
//
//   w = bf(scale number + offset)      number: a small integer; scale, offset: float32, per group of a block
//
// The product is exact in float32 (a scale of 11 bits by a factor of at most 6, by a number of 7 and its
// sign), so fused or not the value has the same bits.
#pragma once

#include <cstring>

#include "core/align.h"
#include "core/types.h"
#include "formats/format.h"

namespace ktmoe::formats {

inline int byte_at(const std::byte* p, size_t i) { return static_cast<int>(p[i]); }
// The nibbles of 16 bytes: the low ones, then the high ones.
inline int nibble_of_16(const std::byte* bytes, size_t i) {
  return byte_at(bytes, i % 16) >> (i / 16 * 4) & 15;
}

// The scales of a block's groups, with room for whole vectors.
template <size_t kGroups>
struct BlockScales {
  static constexpr size_t kRoom = round_up(kGroups, 16);
  float scale[kRoom];
  float offset[kRoom];  // only of formats that have offsets
};

// Bytes as lanes of a word, the lowest first.
[[gnu::always_inline]] inline uint64_t eight_at(const std::byte* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}
[[gnu::always_inline]] inline uint32_t four_at(const std::byte* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}
// Eight numbers of two bits, each in a byte of its own.
constexpr uint64_t spread_twos(uint64_t x) {
  x = (x | x << 24) & 0x000000ff000000ff;
  x = (x | x << 12) & 0x000f000f000f000f;
  return (x | x << 6) & 0x0303030303030303;
}

// Members of a format F; the optional ones are faster, and give the same numbers:
//
//   required    F::kHasOffset
//               F::scales(block, Scales& scales)
//               F::number(block, i)             of value i, or in its place
//               F::group(block, g, int8_t* to)  of values [32 g, 32 g + 32)
//   optional    F::group_numbers, kScaleAt, kOffsetAt      scales in registers, see scaled_groups.h
//   fast path   Unpack<F>::numbers(block, g)               of a group in registers, or in their place
//   (in target  Unpack<F>::nibbles<To>(block, g), kTable   nibbles of a group, and their values
//   regions)    Unpack<F>::scale(block), offset(block)     where a block has one of each
template <class F, size_t kValues, size_t kBytes, size_t kGroupValues>
struct Blocks : NoBlockScales {
  static constexpr bool kHasChannelScale = false, kIsInteger = false;
  static constexpr size_t kBlock = kValues, kBlockBytes = kBytes, kGroup = kGroupValues;
  using Scales = BlockScales<kBlock / kGroup>;

  static constexpr size_t row_bytes(size_t k) { return div_up(k, kBlock) * kBlockBytes; }
  static int number_of(const std::byte* block, size_t i) {
    if constexpr (requires { F::number(block, i); }) {
      return F::number(block, i);
    } else {
      int8_t numbers[32];
      F::group(block, i / 32, numbers);
      return numbers[i % 32];
    }
  }
  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t k = 0; k < w.k; k += kBlock) {
      const std::byte* block = w.row(n) + k / kBlock * kBlockBytes;
      Scales scales;
      F::scales(block, scales);
      for (size_t i = 0; i < kBlock && k + i < w.k; ++i) {
        float value = scales.scale[i / kGroup] * static_cast<float>(number_of(block, i));
        if constexpr (F::kHasOffset) value += scales.offset[i / kGroup];
        out[k + i] = to_float(to_bf16(value));
      }
    }
  }
};

}  // namespace ktmoe::formats
