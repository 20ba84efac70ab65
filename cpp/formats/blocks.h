// What formats of blocks have in common, those of GGUF: a row is blocks of some values one after the other,
// each with its scales among its codes.
//
//   w = bf(scale number + offset)      number whole and small, scale and offset float32 of a group of the
//   block
//
// The product is exact in float32 (a scale of 11 bits by a factor of at most 6, by a number of 8), so fused
// or not the value has the same bits.
#pragma once

#include <cstring>

#include "core/aligned_buffer.h"
#include "core/types.h"
#include "formats/format.h"

namespace ktmoe::formats {

// A block taken apart.
template <size_t kValues, size_t kGroupValues>
struct BlockValues {
  static constexpr size_t kGroup = kGroupValues, kGroups = kValues / kGroupValues;
  alignas(kCacheLine) int8_t number[kValues];
  float scale[kGroups];
  float offset[kGroups];  // only of formats that have offsets
};

// F provides
//   kHasOffset
//   unpack(const std::byte* block, Values& values)    inlined, so that a target compiles it for itself
//   kNumbers, a BlockNumbers: what unpack leaves are nibbles, to be looked up there (optional)
template <class F, size_t kValues, size_t kBytes, size_t kGroupValues>
struct Blocks : NoScalesApart {
  static constexpr bool kHasRowScale = false, kIsInteger = false;
  static constexpr size_t kBlock = kValues, kBlockBytes = kBytes;
  using Values = BlockValues<kValues, kGroupValues>;

  static constexpr size_t row_bytes(size_t k) { return div_up(k, kBlock) * kBlockBytes; }
  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t k = 0; k < w.k; k += kBlock) {
      Values values;
      F::unpack(w.row(n) + k / kBlock * kBlockBytes, values);
      for (size_t i = 0; i < kBlock && k + i < w.k; ++i) {
        float number = values.number[i];
        if constexpr (requires { F::kNumbers; }) number = F::kNumbers.of[values.number[i]];
        float value = values.scale[i / kGroupValues] * number;
        if constexpr (F::kHasOffset) value += values.offset[i / kGroupValues];
        out[k + i] = to_float(to_bf16(value));
      }
    }
  }
};

struct BlockNumbers {
  alignas(16) int8_t of[16];
};

// A float16 in memory.
[[gnu::always_inline]] inline float half_at(const std::byte* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return half_to_float(bits);
}

[[gnu::always_inline]] inline int byte_at(const std::byte* p, size_t i) { return static_cast<int>(p[i]); }

// The nibbles of `count` bytes: the low ones, then the high ones.
template <size_t kCount>
[[gnu::always_inline]] inline void split_nibbles(const std::byte* bytes, int8_t* low, int8_t* high) {
  for (size_t i = 0; i < kCount; ++i) low[i] = static_cast<int8_t>(byte_at(bytes, i) & 15);
  for (size_t i = 0; i < kCount; ++i) high[i] = static_cast<int8_t>(byte_at(bytes, i) >> 4);
}

}  // namespace ktmoe::formats
