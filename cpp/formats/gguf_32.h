// GGUF's formats whose blocks are 32 values that share a scale in float16, the first two bytes: Q4_0, Q4_1,
// Q5_0, Q5_1, Q8_0 and IQ4_NL. Byte i of 16 has the nibbles of values i and i + 16.
#ifndef KTMOE_FORMATS_GGUF_32_H_
#define KTMOE_FORMATS_GGUF_32_H_

#include "formats/blocks.h"

namespace ktmoe::formats {

template <class F, size_t kBytes>
struct OneScale : Blocks<F, 32, kBytes, 32> {
  static constexpr bool kHasOffset = false;
  static constexpr size_t kScaleAt = 0;
  static void scales(const std::byte* block, BlockScales<1>& scales) { scales.scale[0] = half_at(block); }
};
template <class F, size_t kBytes>
struct ScaleAndOffset : Blocks<F, 32, kBytes, 32> {
  static constexpr bool kHasOffset = true;
  static constexpr size_t kScaleAt = 0, kOffsetAt = 2;
  static void scales(const std::byte* block, BlockScales<1>& scales) {
    scales.scale[0] = half_at(block), scales.offset[0] = half_at(block + 2);
  }
};

// What nibbles of the non-linear types stand for: about the numbers of a normal distribution.
alignas(16) inline constexpr int8_t kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                      1,    13,   25,  38,  53,  69,  89,  113};

// [scale][nibbles: 16]
struct Q4_0 : OneScale<Q4_0, 18> {
  static constexpr FormatId kId = FormatId::kQ4_0;
  static constexpr std::string_view kName = "q4_0";
  static constexpr int kGgufType = 2;
  static constexpr IntegerRange kIntegers{-8, 7};
  static int number(const std::byte* block, size_t i) { return kFromMinusEight[nibble_of_16(block + 2, i)]; }
};
static_assert(WeightFormat<Q4_0>);

// [scale][offset][nibbles: 16]
struct Q4_1 : ScaleAndOffset<Q4_1, 20> {
  static constexpr FormatId kId = FormatId::kQ4_1;
  static constexpr std::string_view kName = "q4_1";
  static constexpr int kGgufType = 3;
  static constexpr IntegerRange kIntegers{0, 15};
  static int number(const std::byte* block, size_t i) { return nibble_of_16(block + 4, i); }
};
static_assert(WeightFormat<Q4_1>);

// Nibbles, and 32 bits that stand above them.
inline int five_bits(const std::byte* high, const std::byte* nibbles, size_t i) {
  return nibble_of_16(nibbles, i) | (byte_at(high, i / 8) >> (i % 8) & 1) << 4;
}

// [scale][fifth bits: 4][nibbles: 16]; number = five bits - 16
struct Q5_0 : OneScale<Q5_0, 22> {
  static constexpr FormatId kId = FormatId::kQ5_0;
  static constexpr std::string_view kName = "q5_0";
  static constexpr int kGgufType = 6;
  static constexpr IntegerRange kIntegers{-16, 15};
  static int number(const std::byte* block, size_t i) { return five_bits(block + 2, block + 6, i) - 16; }
};
static_assert(WeightFormat<Q5_0>);

// [scale][offset][fifth bits: 4][nibbles: 16]
struct Q5_1 : ScaleAndOffset<Q5_1, 24> {
  static constexpr FormatId kId = FormatId::kQ5_1;
  static constexpr std::string_view kName = "q5_1";
  static constexpr int kGgufType = 7;
  static constexpr IntegerRange kIntegers{0, 31};
  static int number(const std::byte* block, size_t i) { return five_bits(block + 4, block + 8, i); }
};
static_assert(WeightFormat<Q5_1>);

// [scale][int8: 32]
struct Q8_0 : OneScale<Q8_0, 34> {
  static constexpr FormatId kId = FormatId::kQ8_0;
  static constexpr std::string_view kName = "q8_0";
  static constexpr int kGgufType = 8;
  static constexpr IntegerRange kIntegers{-128, 127};
  static int number(const std::byte* block, size_t i) { return static_cast<int8_t>(block[2 + i]); }
};
static_assert(WeightFormat<Q8_0>);

// [scale][nibbles: 16]
struct Iq4Nl : OneScale<Iq4Nl, 18> {
  static constexpr FormatId kId = FormatId::kIq4Nl;
  static constexpr std::string_view kName = "iq4_nl";
  static constexpr int kGgufType = 20;
  static constexpr IntegerRange kIntegers{-127, 113};
  static int number(const std::byte* block, size_t i) { return kNonLinear[nibble_of_16(block + 2, i)]; }
};
static_assert(WeightFormat<Iq4Nl>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_GGUF_32_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

// Scale and offset begin the block.
struct ScaleInBlock {
  static KT_INLINE Vec::Float scale(const std::byte* block) { return Vec::half(block); }
};
struct ScaleAndOffsetInBlock : ScaleInBlock {
  static KT_INLINE Vec::Float offset(const std::byte* block) { return Vec::half(block + 2); }
};

template <>
struct Unpack<formats::Q4_0> : ScaleInBlock {
  static constexpr const auto& kTable = kFromMinusEight;
  template <class To = PackedNibbles>
  static KT_INLINE auto nibbles(const std::byte* block, size_t) {
    return To::in_16(block + 2);
  }
};
template <>
struct Unpack<formats::Q4_1> : ScaleAndOffsetInBlock {
  static constexpr const auto& kTable = kFromZero;
  template <class To = PackedNibbles>
  static KT_INLINE auto nibbles(const std::byte* block, size_t) {
    return To::in_16(block + 4);
  }
};
template <>
struct Unpack<formats::Q5_0> : ScaleInBlock {
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t) {
    return minus(with_bits<4>(nibbles_of_16(block + 6), spread_bits(block + 2)), 16);
  }
};
template <>
struct Unpack<formats::Q5_1> : ScaleAndOffsetInBlock {
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t) {
    return with_bits<4>(nibbles_of_16(block + 8), spread_bits(block + 4));
  }
};
template <>
struct Unpack<formats::Q8_0> : ScaleInBlock {
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t) { return load_32(block + 2); }
};
template <>
struct Unpack<formats::Iq4Nl> : ScaleInBlock {
  static constexpr const auto& kTable = formats::kNonLinear;
  template <class To = PackedNibbles>
  static KT_INLINE auto nibbles(const std::byte* block, size_t) {
    return To::in_16(block + 2);
  }
};

#endif  // KT_TARGET_REGION
