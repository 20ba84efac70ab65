// GGUF's formats Q2_K to Q6_K and IQ4_XS.
#ifndef KTMOE_FORMATS_GGUF_K_H_
#define KTMOE_FORMATS_GGUF_K_H_

#include "formats/gguf_32.h"
#include "formats/scaled_groups.h"

namespace ktmoe::formats {

constexpr uint64_t joined(uint32_t first, uint32_t second) { return first | uint64_t{second} << 32; }
inline constexpr uint64_t kLowFour = 0x0f0f0f0f0f0f0f0f, kLowTwo = 0x0303030303030303,
                          kSigns = 0x8080808080808080;
// 32 less than each of eight numbers of six bits.
constexpr uint64_t minus_32(uint64_t numbers) { return ((numbers | kSigns) - 0x2020202020202020) ^ kSigns; }

// Value 128 h + 32 j + i of 64 bytes is bits 2 j and 2 j + 1 of byte 32 h + i.
inline int two_bits(const std::byte* bytes, size_t i) {
  return byte_at(bytes, i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
}

// [scales of 4 bits, minima above them: 16][numbers of 2 bits: 64][scale, minimum: float16]
struct Q2K : ScaledGroups<Q2K, 84, 16, 80, 82> {
  static constexpr FormatId kId = FormatId::kQ2K;
  static constexpr std::string_view kName = "q2_k";
  static constexpr int kGgufType = 10;
  static constexpr IntegerRange kIntegers{0, 3};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    for (size_t i = 0; i < 2; ++i) {
      numbers.scale[i] = eight_at(block + 8 * i) & kLowFour;
      numbers.offset[i] = eight_at(block + 8 * i) >> 4 & kLowFour;
    }
  }
  static int number(const std::byte* block, size_t i) { return two_bits(block + 16, i); }
};
static_assert(WeightFormat<Q2K>);

// [third bits: 32][numbers of 2 bits: 64][scales of 6 bits: 12][scale: float16]; number = three bits - 4. Bit
// g of byte i of the third bits is that of value 32 g + i.
struct Q3K : ScaledGroups<Q3K, 110, 16, 108> {
  static constexpr FormatId kId = FormatId::kQ3K;
  static constexpr std::string_view kName = "q3_k";
  static constexpr int kGgufType = 11;
  static constexpr IntegerRange kIntegers{-4, 3};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    // Four bits of each in eight bytes, two in four.
    const uint64_t low = eight_at(block + 96);
    const uint32_t high = four_at(block + 104);
    numbers.scale[0] = minus_32((low & kLowFour) | (joined(high, high >> 2) & kLowTwo) << 4);
    numbers.scale[1] = minus_32((low >> 4 & kLowFour) | (joined(high >> 4, high >> 6) & kLowTwo) << 4);
  }
  static int number(const std::byte* block, size_t i) {
    return (two_bits(block + 32, i) | (byte_at(block, i % 32) >> (i / 32) & 1) << 2) - 4;
  }
};
static_assert(WeightFormat<Q3K>);

// Scales and minima of Q4_K and Q5_K: [scale, minimum: float16][six bits of each of 8 and 8: 12]. The first
// four of both have bytes of their own, whose upper two bits belong to the others.
template <class F, size_t kBytes>
struct EightScales : ScaledGroups<F, kBytes, 32, 0, 2> {
  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    const uint32_t s = four_at(block + 4), m = four_at(block + 8), both = four_at(block + 12);
    numbers.scale[0] = joined(s & 0x3f3f3f3f, (both & 0x0f0f0f0f) | (s >> 6 & 0x03030303) << 4);
    numbers.offset[0] = joined(m & 0x3f3f3f3f, (both >> 4 & 0x0f0f0f0f) | (m >> 6 & 0x03030303) << 4);
  }
};

// 32 bytes have the nibbles of a group and of the next.
inline int nibble_of_groups(const std::byte* bytes, size_t i) {
  return byte_at(bytes, i / 64 * 32 + i % 32) >> (i / 32 % 2 * 4) & 15;
}

// [scales][nibbles: 128]
struct Q4K : EightScales<Q4K, 144> {
  static constexpr FormatId kId = FormatId::kQ4K;
  static constexpr std::string_view kName = "q4_k";
  static constexpr int kGgufType = 12;
  static constexpr IntegerRange kIntegers{0, 15};
  static int number(const std::byte* block, size_t i) { return nibble_of_groups(block + 16, i); }
};
static_assert(WeightFormat<Q4K>);

// [scales][fifth bits: 32][nibbles: 128]; bit g of byte i is that of value 32 g + i
struct Q5K : EightScales<Q5K, 176> {
  static constexpr FormatId kId = FormatId::kQ5K;
  static constexpr std::string_view kName = "q5_k";
  static constexpr int kGgufType = 13;
  static constexpr IntegerRange kIntegers{0, 31};
  static int number(const std::byte* block, size_t i) {
    return nibble_of_groups(block + 48, i) | (byte_at(block + 16, i % 32) >> (i / 32) & 1) << 4;
  }
};
static_assert(WeightFormat<Q5K>);

// [nibbles: 128][upper two bits: 64][scales, int8: 16][scale: float16]; number = six bits - 32. Nibbles of 64
// bytes: the low ones, then the high ones.
struct Q6K : ScaledGroups<Q6K, 210, 16, 208> {
  static constexpr FormatId kId = FormatId::kQ6K;
  static constexpr std::string_view kName = "q6_k";
  static constexpr int kGgufType = 14;
  static constexpr IntegerRange kIntegers{-32, 31};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    for (size_t i = 0; i < 2; ++i) numbers.scale[i] = eight_at(block + 192 + 8 * i);
  }
  static int number(const std::byte* block, size_t i) {
    const int nibble = byte_at(block, i / 128 * 64 + i % 64) >> (i % 128 / 64 * 4) & 15;
    return (nibble | two_bits(block + 128, i) << 4) - 32;
  }
};
static_assert(WeightFormat<Q6K>);

// Eight nibbles, each in a byte of its own.
constexpr uint64_t spread_nibbles(uint64_t x) {
  x = (x | x << 16) & 0x0000ffff0000ffff;
  x = (x | x << 8) & 0x00ff00ff00ff00ff;
  return (x | x << 4) & kLowFour;
}
// [scale: float16][upper two bits of scales: 2][lower four: 4][nibbles: 128], groups as blocks of IQ4_NL
struct Iq4Xs : ScaledGroups<Iq4Xs, 136, 32, 0> {
  static constexpr FormatId kId = FormatId::kIq4Xs;
  static constexpr std::string_view kName = "iq4_xs";
  static constexpr int kGgufType = 23;
  static constexpr IntegerRange kIntegers{-127, 113};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    numbers.scale[0] = minus_32(spread_nibbles(four_at(block + 4)) | spread_twos(four_at(block) >> 16) << 4);
  }
  static int number(const std::byte* block, size_t i) {
    return kNonLinear[nibble_of_16(block + 8 + i / 32 * 16, i % 32)];
  }
};
static_assert(WeightFormat<Iq4Xs>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_GGUF_K_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <>
struct Unpack<formats::Q2K> {
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t g) {
    return bits_of(load_32(block + 16 + g / 4 * 32), g % 4 * 2, 3);
  }
};
template <>
struct Unpack<formats::Q3K> {
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t g) {
    const Bytes32 low = bits_of(load_32(block + 32 + g / 4 * 32), g % 4 * 2, 3);
    return minus(with_bits<2>(low, bits_of(load_32(block), g, 1)), 4);
  }
};
template <>
struct Unpack<formats::Q4K> {
  static constexpr const auto& kTable = kFromZero;
  template <class To = PackedNibbles>
  static KT_INLINE auto nibbles(const std::byte* block, size_t g) {
    return To::in_32(block + 16 + g / 2 * 32, g % 2 == 1);
  }
};
template <>
struct Unpack<formats::Q5K> {
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t g) {
    const Bytes32 low = bits_of(load_32(block + 48 + g / 2 * 32), g % 2 * 4, 15);
    return with_bits<4>(low, bits_of(load_32(block + 16), g, 1));
  }
};
template <>
struct Unpack<formats::Q6K> {
  static KT_INLINE Bytes32 numbers(const std::byte* block, size_t g) {
    const Bytes32 low = bits_of(load_32(block + g / 4 * 64 + g % 2 * 32), g % 4 / 2 * 4, 15);
    const Bytes32 high = bits_of(load_32(block + 128 + g / 4 * 32), g % 4 * 2, 3);
    return minus(with_bits<4>(low, high), 32);
  }
};
template <>
struct Unpack<formats::Iq4Xs> {
  static constexpr const auto& kTable = formats::kNonLinear;
  template <class To = PackedNibbles>
  static KT_INLINE auto nibbles(const std::byte* block, size_t g) {
    return To::in_16(block + 8 + 16 * g);
  }
};

#endif  // KT_TARGET_REGION
