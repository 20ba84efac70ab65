// Common to GGUF's formats of 256 values to a block: a block has one scale in float16, by which the scales of
// its groups are integers.
#pragma once

#include "formats/blocks.h"

namespace ktmoe::formats {

// The integers of a block's groups, for scales and for offsets: int8, eight to a word, the first group
// lowest.
struct GroupNumbers {
  uint64_t scale[2] = {}, offset[2] = {};
};
constexpr float number_of_group(const uint64_t* words, size_t g) {
  return static_cast<float>(static_cast<int8_t>(words[g / 8] >> 8 * (g % 8)));
}

// Member of F, inlined, so that a target compiles it for itself: F::group_numbers(block, GroupNumbers&).
//
//   scale = block scale * number      block scale = kScaleFactor * the float16 at kScaleAt
//   offset = -other * number          other = the float16 at kOffsetAt, of formats with offsets
//
// A format whose float16 is scattered defines `scale_bits` itself.
template <class F, size_t kBytes, size_t kGroupValues, size_t kScale, size_t kOffset = 0>
struct ScaledGroups : Blocks<F, 256, kBytes, kGroupValues> {
  static constexpr bool kHasOffset = kOffset != 0;
  static constexpr size_t kScaleAt = kScale, kOffsetAt = kOffset, kGroups = 256 / kGroupValues;
  static constexpr float kScaleFactor = 1;

  static uint16_t scale_bits(const std::byte* block) { return half_bits_at(block + kScaleAt); }
  static void scales(const std::byte* block, BlockScales<kGroups>& scales) {
    GroupNumbers numbers;
    F::group_numbers(block, numbers);
    const float scale = F::kScaleFactor * half_to_float(F::scale_bits(block));
    for (size_t g = 0; g < kGroups; ++g) {
      scales.scale[g] = scale * number_of_group(numbers.scale, g);
      if (kHasOffset) scales.offset[g] = -half_at(block + kOffsetAt) * number_of_group(numbers.offset, g);
    }
  }
};

}  // namespace ktmoe::formats
