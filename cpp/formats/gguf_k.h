// GGUF's formats whose blocks are 256 values, with scales of groups that are themselves whole numbers by one
// scale in float16: Q2_K to Q6_K and IQ4_XS.
#ifndef KTMOE_FORMATS_GGUF_K_H_
#define KTMOE_FORMATS_GGUF_K_H_

#include "formats/blocks.h"
#include "formats/gguf_32.h"

namespace ktmoe::formats {

template <class F, size_t kBytes, size_t kGroupValues>
using Block256 = Blocks<F, 256, kBytes, kGroupValues>;

// 64 bytes of four numbers of two bits: value 128 h + 32 j + i has bits 2 j of byte 32 h + i.
[[gnu::always_inline]] inline void unpack_twos(const std::byte* bytes, int8_t* number) {
  for (size_t half = 0; half < 2; ++half)
    for (size_t j = 0; j < 4; ++j)
      for (size_t i = 0; i < 32; ++i)
        number[128 * half + 32 * j + i] = static_cast<int8_t>(byte_at(bytes, 32 * half + i) >> (2 * j) & 3);
}

// [scales of 4 bits, minima above them: 16][numbers of 2 bits: 64][scale, minimum: 2 of float16]
struct Q2K : Block256<Q2K, 84, 16> {
  static constexpr FormatId kId = FormatId::kQ2K;
  static constexpr std::string_view kName = "q2_k";
  static constexpr bool kHasOffset = true;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    const float scale = half_at(block + 80), minimum = half_at(block + 82);
    for (size_t g = 0; g < Values::kGroups; ++g) {
      values.scale[g] = scale * static_cast<float>(byte_at(block, g) & 15);
      values.offset[g] = -(minimum * static_cast<float>(byte_at(block, g) >> 4));
    }
    unpack_twos(block + 16, values.number);
  }
};
static_assert(WeightFormat<Q2K>);

// [third bits: 32][numbers of 2 bits: 64][scales of 6 bits: 12][scale: float16]; number = three bits - 4
struct Q3K : Block256<Q3K, 110, 16> {
  static constexpr FormatId kId = FormatId::kQ3K;
  static constexpr std::string_view kName = "q3_k";
  static constexpr bool kHasOffset = false;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    const float scale = half_at(block + 108);
    const std::byte* packed = block + 96;  // four bits of each in eight bytes, two in four
    for (size_t g = 0; g < Values::kGroups; ++g) {
      const int low = byte_at(packed, g % 8) >> (g / 8 * 4) & 15;
      const int high = byte_at(packed, 8 + g % 4) >> (g / 4 * 2) & 3;
      values.scale[g] = scale * static_cast<float>((low | high << 4) - 32);
    }
    unpack_twos(block + 32, values.number);
    for (size_t j = 0; j < 8; ++j)
      for (size_t i = 0; i < 32; ++i)
        values.number[32 * j + i] =
            static_cast<int8_t>(values.number[32 * j + i] + (byte_at(block, i) >> j & 1) * 4 - 4);
  }
};
static_assert(WeightFormat<Q3K>);

// Scales and minima of Q4_K and Q5_K: [scale, minimum: 2 of float16][six bits of each of 8 and 8: 12]. The
// first four of both have bytes of their own, whose upper two bits belong to the others.
template <class Values>
[[gnu::always_inline]] inline void unpack_scales_of_8(const std::byte* block, Values& values) {
  const float scale = half_at(block), minimum = half_at(block + 2);
  const std::byte* packed = block + 4;
  for (size_t g = 0; g < 4; ++g) {
    const int s = byte_at(packed, g), m = byte_at(packed, g + 4), both = byte_at(packed, g + 8);
    values.scale[g] = scale * static_cast<float>(s & 63);
    values.offset[g] = -(minimum * static_cast<float>(m & 63));
    values.scale[g + 4] = scale * static_cast<float>((both & 15) | s >> 6 << 4);
    values.offset[g + 4] = -(minimum * static_cast<float>(both >> 4 | m >> 6 << 4));
  }
}

// 128 bytes: 32 have the nibbles of a group and of the next.
[[gnu::always_inline]] inline void unpack_nibbles_of_8(const std::byte* bytes, int8_t* number) {
  for (size_t g = 0; g < 8; g += 2) split_nibbles<32>(bytes + 16 * g, number + 32 * g, number + 32 * (g + 1));
}

struct Q4K : Block256<Q4K, 144, 32> {
  static constexpr FormatId kId = FormatId::kQ4K;
  static constexpr std::string_view kName = "q4_k";
  static constexpr bool kHasOffset = true;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    unpack_scales_of_8(block, values);
    unpack_nibbles_of_8(block + 16, values.number);
  }
};
static_assert(WeightFormat<Q4K>);

// As Q4_K, with [fifth bits: 32] before the nibbles: bit g of byte i is that of value i of group g.
struct Q5K : Block256<Q5K, 176, 32> {
  static constexpr FormatId kId = FormatId::kQ5K;
  static constexpr std::string_view kName = "q5_k";
  static constexpr bool kHasOffset = true;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    unpack_scales_of_8(block, values);
    unpack_nibbles_of_8(block + 48, values.number);
    for (size_t g = 0; g < 8; ++g)
      for (size_t i = 0; i < 32; ++i)
        values.number[32 * g + i] =
            static_cast<int8_t>(values.number[32 * g + i] | (byte_at(block + 16, i) >> g & 1) << 4);
  }
};
static_assert(WeightFormat<Q5K>);

// [nibbles: 128][upper two bits: 64][scales, int8: 16][scale: float16]; number = six bits - 32
struct Q6K : Block256<Q6K, 210, 16> {
  static constexpr FormatId kId = FormatId::kQ6K;
  static constexpr std::string_view kName = "q6_k";
  static constexpr bool kHasOffset = false;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    const float scale = half_at(block + 208);
    for (size_t g = 0; g < Values::kGroups; ++g)
      values.scale[g] = scale * static_cast<float>(static_cast<int8_t>(block[192 + g]));
    for (size_t half = 0; half < 2; ++half) {
      int8_t* number = values.number + 128 * half;
      split_nibbles<64>(block + 64 * half, number, number + 64);
      for (size_t j = 0; j < 4; ++j)
        for (size_t i = 0; i < 32; ++i)
          number[32 * j + i] = static_cast<int8_t>(
              (number[32 * j + i] | (byte_at(block, 128 + 32 * half + i) >> (2 * j) & 3) << 4) - 32);
    }
  }
};
static_assert(WeightFormat<Q6K>);

// [scale: float16][upper two bits of scales: 2][lower four: 4][nibbles: 128], groups as blocks of IQ4_NL
struct Iq4Xs : Block256<Iq4Xs, 136, 32> {
  static constexpr FormatId kId = FormatId::kIq4Xs;
  static constexpr std::string_view kName = "iq4_xs";
  static constexpr bool kHasOffset = false;
  static constexpr const BlockNumbers& kNumbers = kNonLinear;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    const float scale = half_at(block);
    for (size_t g = 0; g < Values::kGroups; ++g) {
      const int low = byte_at(block, 4 + g / 2) >> (g % 2 * 4) & 15;
      const int high = byte_at(block, 2 + g / 4) >> (g % 4 * 2) & 3;
      values.scale[g] = scale * static_cast<float>((low | high << 4) - 32);
      split_nibbles<16>(block + 8 + 16 * g, values.number + 32 * g, values.number + 32 * g + 16);
    }
  }
};
static_assert(WeightFormat<Iq4Xs>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_GGUF_K_H_
