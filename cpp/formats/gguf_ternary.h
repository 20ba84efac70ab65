// GGUF's types whose numbers are -1, 0 and 1, or signs alone, with one scale per block in float16.
#ifndef KTMOE_FORMATS_GGUF_TERNARY_H_
#define KTMOE_FORMATS_GGUF_TERNARY_H_

#include "formats/blocks.h"
#include "formats/gguf_k.h"

namespace ktmoe::formats {

template <class F, size_t kValues, size_t kBytes, size_t kScale>
struct OneScalePerBlock : Blocks<F, kValues, kBytes, kValues> {
  static constexpr bool kHasOffset = false;
  static constexpr size_t kScaleAt = kScale;
  static void scales(const std::byte* block, BlockScales<1>& scales) {
    scales.scale[0] = half_at(block + kScaleAt);
  }
};

// [five digits to the base of 3: 48][four: 4][scale]. A byte is its digits as a fraction of 256, the first
// digit that of the largest weight; value 32 d + i of 160 is digit d of byte i, then 16 d + i of 80, then 4 d
// + i.
struct Tq1_0 : OneScalePerBlock<Tq1_0, 256, 54, 52> {
  static constexpr FormatId kId = FormatId::kTq1_0;
  static constexpr std::string_view kName = "tq1_0";
  static constexpr int kGgufType = 34;
  static constexpr IntegerRange kIntegers{-1, 1};

  static int number(const std::byte* block, size_t i) {
    constexpr uint32_t kPowers[5] = {1, 3, 9, 27, 81};
    const size_t first = i < 160 ? 0 : i < 240 ? 160 : 240;
    const size_t bytes = i < 160 ? 32 : i < 240 ? 16 : 4, begin = i < 160 ? 0 : i < 240 ? 32 : 48;
    const size_t digit = (i - first) / bytes, at = begin + (i - first) % bytes;
    const uint32_t rest = static_cast<uint32_t>(byte_at(block, at)) * kPowers[digit] & 255;
    return static_cast<int>(rest * 3 >> 8) - 1;
  }
};
static_assert(WeightFormat<Tq1_0>);

// [numbers of two bits, 1 more than they stand for: 64][scale]
struct Tq2_0 : OneScalePerBlock<Tq2_0, 256, 66, 64> {
  static constexpr FormatId kId = FormatId::kTq2_0;
  static constexpr std::string_view kName = "tq2_0";
  static constexpr int kGgufType = 35;
  static constexpr IntegerRange kIntegers{-1, 2};
  static int number(const std::byte* block, size_t i) { return two_bits(block, i) - 1; }
};
static_assert(WeightFormat<Tq2_0>);

// [scale][bits: 16]; 1 for a bit that is set, else -1
struct Q1_0 : OneScalePerBlock<Q1_0, 128, 18, 0> {
  static constexpr FormatId kId = FormatId::kQ1_0;
  static constexpr std::string_view kName = "q1_0";
  static constexpr int kGgufType = 41;
  static constexpr IntegerRange kIntegers{-1, 1};
  static int number(const std::byte* block, size_t i) {
    return 2 * (byte_at(block, 2 + i / 8) >> (i % 8) & 1) - 1;
  }
};
static_assert(WeightFormat<Q1_0>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_GGUF_TERNARY_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <>
struct Unpack<formats::Tq2_0> {
  static KT_INLINE Vec::Float scale(const std::byte* block) {
    return Vec::half(block + formats::Tq2_0::kScaleAt);
  }
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t g) {
    return minus(bits_of(load_32(block + g / 4 * 32), g % 4 * 2, 3), 1);
  }
};
template <>
struct Unpack<formats::Q1_0> {
  static KT_INLINE Vec::Float scale(const std::byte* block) {
    return Vec::half(block + formats::Q1_0::kScaleAt);
  }
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t g) {
    const Bytes32 bits = spread_bits(block + 2 + 4 * g), ones = minus(bits_of(bits, 0, 0), -1);
    return minus(with_bits<1>(ones, bits), 2);
  }
};

#endif  // KT_TARGET_REGION
