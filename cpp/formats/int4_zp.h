// int4 with zero points, as AWQ and asymmetric GPTQ have it: w = bf((q - z) scale), a nibble q, and for a
// block of 32, 64 or 128 values a zero point z and a scale. Of a zero point's byte the lowest five bits
// count, so that q - z is an int8 whatever the byte.
#ifndef KTMOE_FORMATS_INT4_ZP_H_
#define KTMOE_FORMATS_INT4_ZP_H_

#include "formats/blocks.h"

namespace ktmoe::formats {

// [scale: float16][zero point][nibbles: 16 bytes for 32 values], byte i of 16 with those of values i and i +
// 16
template <class F, size_t kSize>
struct Int4Zp : Blocks<F, kSize, 3 + kSize / 2, kSize> {
  static constexpr bool kHasOffset = false;
  static constexpr size_t kScaleAt = 0;
  static constexpr IntegerRange kIntegers{-31, 15};

  static void scales(const std::byte* block, BlockScales<1>& scales) { scales.scale[0] = half_at(block); }
  static int zero(const std::byte* block) { return byte_at(block, 2) & 31; }
  static const std::byte* nibbles(const std::byte* block, size_t g) { return block + 3 + 16 * g; }
  static int number(const std::byte* block, size_t i) {
    return nibble_of_16(nibbles(block, i / 32), i % 32) - zero(block);
  }
};

struct Int4ZpGroup32 : Int4Zp<Int4ZpGroup32, 32> {
  static constexpr FormatId kId = FormatId::kInt4ZpGroup32;
  static constexpr std::string_view kName = "int4_zp_group32";
};
static_assert(WeightFormat<Int4ZpGroup32>);

struct Int4ZpGroup64 : Int4Zp<Int4ZpGroup64, 64> {
  static constexpr FormatId kId = FormatId::kInt4ZpGroup64;
  static constexpr std::string_view kName = "int4_zp_group64";
};
static_assert(WeightFormat<Int4ZpGroup64>);

struct Int4ZpGroup128 : Int4Zp<Int4ZpGroup128, 128> {
  static constexpr FormatId kId = FormatId::kInt4ZpGroup128;
  static constexpr std::string_view kName = "int4_zp_group128";
};
static_assert(WeightFormat<Int4ZpGroup128>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_INT4_ZP_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <class Format>
struct UnpackInt4Zp {
  static KT_INLINE Vec::Float scale(const std::byte* block) { return Vec::half(block); }
  static KT_INLINE int zero(const std::byte* block) { return static_cast<int>(block[2]) & 31; }
  static KT_INLINE auto packed(const std::byte* block, size_t g) {
    return PackedNibbles::in_16(block + 3 + 16 * g);
  }
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t g) {
    return minus(nibbles_of_16(block + 3 + 16 * g), zero(block));
  }
};
template <>
struct Unpack<formats::Int4ZpGroup32> : UnpackInt4Zp<formats::Int4ZpGroup32> {};
template <>
struct Unpack<formats::Int4ZpGroup64> : UnpackInt4Zp<formats::Int4ZpGroup64> {};
template <>
struct Unpack<formats::Int4ZpGroup128> : UnpackInt4Zp<formats::Int4ZpGroup128> {};

#endif  // KT_TARGET_REGION
