// GGUF's types of E2M1 numbers: MXFP4, as gpt-oss has it, and NVFP4. Numbers are doubled, scales halved.
#ifndef KTMOE_FORMATS_GGUF_FP4_H_
#define KTMOE_FORMATS_GGUF_FP4_H_

#include "formats/blocks.h"
#include "formats/small_floats.h"

namespace ktmoe::formats {

alignas(16) inline constexpr int8_t kE2m1Doubled[16] = {
    e2m1_doubled(0),  e2m1_doubled(1),  e2m1_doubled(2),  e2m1_doubled(3), e2m1_doubled(4),  e2m1_doubled(5),
    e2m1_doubled(6),  e2m1_doubled(7),  e2m1_doubled(8),  e2m1_doubled(9), e2m1_doubled(10), e2m1_doubled(11),
    e2m1_doubled(12), e2m1_doubled(13), e2m1_doubled(14), e2m1_doubled(15)};

// [scale: E8M0][nibbles: 16]. Here 255 is a power of two like the others, not a NaN.
struct GgufMxFp4 : Blocks<GgufMxFp4, 32, 17, 32> {
  static constexpr FormatId kId = FormatId::kGgufMxFp4;
  static constexpr std::string_view kName = "mxfp4";
  static constexpr int kGgufType = 39;
  static constexpr IntegerRange kIntegers{-12, 12};
  static constexpr bool kHasOffset = false;

  // By the byte of a scale.
  static constexpr auto kScaleValues = table_of_bytes([](uint8_t byte) {
    const uint32_t exponent = byte;
    return std::bit_cast<float>(exponent < 2 ? uint32_t{0x200000} << exponent : (exponent - 1) << 23);
  });
  static float half_scale(const std::byte* block) { return kScaleValues[static_cast<uint8_t>(block[0])]; }
  static void scales(const std::byte* block, BlockScales<1>& scales) { scales.scale[0] = half_scale(block); }
  static int number(const std::byte* block, size_t i) { return kE2m1Doubled[nibble_of_16(block + 1, i)]; }
};
static_assert(WeightFormat<GgufMxFp4>);

// [scales of 16 values, E4M3 without a sign: 4][nibbles of 16 values, the low ones first: 8] * 4. A scale
// whose seven bits are set is 0.
struct GgufNvFp4 : Blocks<GgufNvFp4, 64, 36, 16> {
  static constexpr FormatId kId = FormatId::kGgufNvFp4;
  static constexpr std::string_view kName = "nvfp4";
  static constexpr int kGgufType = 40;
  static constexpr IntegerRange kIntegers{-12, 12};
  static constexpr bool kHasOffset = false;

  // By the byte of a scale. All ones with an eighth bit are a number here, where E4M3 has none.
  static constexpr auto kScaleValues = table_of_bytes([](uint8_t bits) {
    return bits == 127 ? 0.0f : bits == 255 ? 240.0f : halved(kE4m3[bits & 127]);
  });
  static void scales(const std::byte* block, BlockScales<4>& scales) {
    for (size_t g = 0; g < 4; ++g) scales.scale[g] = kScaleValues[static_cast<uint8_t>(block[g])];
  }
  static int number(const std::byte* block, size_t i) {
    return kE2m1Doubled[byte_at(block, 4 + i / 16 * 8 + i % 8) >> (i % 16 / 8 * 4) & 15];
  }
};
static_assert(WeightFormat<GgufNvFp4>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_GGUF_FP4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <>
struct Unpack<formats::GgufMxFp4> {
  static constexpr const auto& kTable = formats::kE2m1Doubled;
  static KT_INLINE Vec::Float scale(const std::byte* block) {
    return Vec::set(formats::GgufMxFp4::half_scale(block));
  }
  static KT_INLINE Floats8 scale_of_byte(const Ints8& bytes) { return half_of_exponents(bytes); }
  template <class To = PackedNibbles>
  static KT_INLINE auto nibbles(const std::byte* block, size_t) {
    return To::in_16(block + 1);
  }
};

#endif  // KT_TARGET_REGION
