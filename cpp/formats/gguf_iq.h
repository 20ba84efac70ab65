// GGUF's types of one to three bits: eight or four values at a time are a point of a lattice (gguf_points.h),
// chosen by a code, with signs beside it. Blocks are 256 values; groups have whole-numbered scales by one
// scale in float16.
#pragma once

#include <bit>

#include "formats/gguf_k.h"
#include "formats/gguf_points.h"

namespace ktmoe::formats {

// Eight coordinates 0 to 2 as 8, 25 and 43.
constexpr uint64_t sizes_of_eight(uint16_t point) {
  const uint64_t x = spread_twos(point);
  return 0x0808080808080808 + (x | x << 4) + (x >> 1 & 0x0101010101010101);
}
// Four coordinates 0 to 7, each in a byte of its own.
constexpr uint32_t spread_threes(uint32_t x) {
  x = (x | x << 10) & 0x003f003f;
  return (x | x << 5) & 0x07070707;
}
// As 4, 12, .. 52 and 62; as the odd numbers from 1 on.
constexpr uint32_t sizes_of_four(uint16_t point) {
  const uint32_t x = spread_threes(point);
  return 0x04040404 + 8 * x + ((x & x >> 1 & x >> 2) & 0x01010101) * 2;
}
constexpr uint32_t odd_sizes_of_four(uint16_t point) { return 0x01010101 + 2 * spread_threes(point); }

// Eight sizes of 1 to 127 with the signs of eight bits.
constexpr uint64_t with_signs(uint64_t sizes, uint64_t signs) {
  uint64_t negative = (signs * 0x0101010101010101) & 0x8040201008040201;  // a bit of each byte
  negative = ((negative + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101) * 0xff;
  return (sizes ^ negative) + (negative & 0x0101010101010101);
}
// Seven signs; the eighth makes the number of negative ones even.
constexpr uint64_t eight_signs(uint32_t seven) {
  return seven | static_cast<uint32_t>(std::popcount(seven) & 1) << 7;
}
inline void store_eight(uint64_t numbers, int8_t* to) { std::memcpy(to, &numbers, sizeof numbers); }

// The numbers of groups are odd: twice those of four bits, and one.
constexpr uint64_t odd_bytes(uint64_t numbers) { return 2 * numbers + 0x0101010101010101; }

template <class F, size_t kBytes, size_t kGroupValues, int kFractions, size_t kScale = 0>
struct LatticeBlocks : ScaledGroups<F, kBytes, kGroupValues, kScale> {
  static constexpr float kScaleFactor = 1.0f / kFractions;
};

// [scale][32 values: four codes of a byte; four times seven signs, scale of four bits: 4 bytes] * 8
struct Iq2Xxs : LatticeBlocks<Iq2Xxs, 66, 32, 8> {
  static constexpr FormatId kId = FormatId::kIq2Xxs;
  static constexpr std::string_view kName = "iq2_xxs";
  static constexpr int kGgufType = 16;
  static constexpr IntegerRange kIntegers{-43, 43};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    uint64_t nibbles = 0;
    for (size_t g = 0; g < 8; ++g) nibbles |= uint64_t{four_at(block + 6 + 8 * g) >> 28} << 8 * g;
    numbers.scale[0] = odd_bytes(nibbles);
  }
  static void group(const std::byte* block, size_t g, int8_t* to) {
    const std::byte* codes = block + 2 + 8 * g;
    const uint32_t signs = four_at(codes + 4);
    for (size_t i = 0; i < 4; ++i)
      store_eight(
          with_signs(sizes_of_eight(kPoints256[byte_at(codes, i)]), eight_signs(signs >> 7 * i & 127)),
          to + 8 * i);
  }
};
static_assert(WeightFormat<Iq2Xxs>);

// [scale][code of nine bits, seven signs: 2 bytes] * 32 [scales of four bits: 8]
struct Iq2Xs : LatticeBlocks<Iq2Xs, 74, 16, 8> {
  static constexpr FormatId kId = FormatId::kIq2Xs;
  static constexpr std::string_view kName = "iq2_xs";
  static constexpr int kGgufType = 17;
  static constexpr IntegerRange kIntegers{-43, 43};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    for (size_t i = 0; i < 2; ++i) numbers.scale[i] = odd_bytes(spread_nibbles(four_at(block + 66 + 4 * i)));
  }
  static void group(const std::byte* block, size_t g, int8_t* to) {
    for (size_t i = 0; i < 4; ++i) {
      const uint32_t code = half_bits_at(block + 2 + 8 * g + 2 * i);
      store_eight(with_signs(sizes_of_eight(kPoints512[code & 511]), eight_signs(code >> 9)), to + 8 * i);
    }
  }
};
static_assert(WeightFormat<Iq2Xs>);

// [scale][codes: 32][signs: 32][two upper bits of codes: 8][scales of four bits: 8]
struct Iq2S : LatticeBlocks<Iq2S, 82, 16, 8> {
  static constexpr FormatId kId = FormatId::kIq2S;
  static constexpr std::string_view kName = "iq2_s";
  static constexpr int kGgufType = 22;
  static constexpr IntegerRange kIntegers{-43, 43};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    for (size_t i = 0; i < 2; ++i) numbers.scale[i] = odd_bytes(spread_nibbles(four_at(block + 74 + 4 * i)));
  }
  static void group(const std::byte* block, size_t g, int8_t* to) {
    const uint32_t upper = static_cast<uint32_t>(byte_at(block, 66 + g));
    for (size_t i = 0; i < 4; ++i) {
      const uint32_t code = static_cast<uint32_t>(byte_at(block, 2 + 4 * g + i)) | (upper >> 2 * i & 3) << 8;
      const auto signs = static_cast<uint64_t>(byte_at(block, 34 + 4 * g + i));
      store_eight(with_signs(sizes_of_eight(kPoints1024[code]), signs), to + 8 * i);
    }
  }
};
static_assert(WeightFormat<Iq2S>);

// [scale][codes: 64][32 values: four times seven signs, scale of four bits: 4 bytes] * 8
struct Iq3Xxs : LatticeBlocks<Iq3Xxs, 98, 32, 4> {
  static constexpr FormatId kId = FormatId::kIq3Xxs;
  static constexpr std::string_view kName = "iq3_xxs";
  static constexpr int kGgufType = 18;
  static constexpr IntegerRange kIntegers{-62, 62};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    uint64_t nibbles = 0;
    for (size_t g = 0; g < 8; ++g) nibbles |= uint64_t{four_at(block + 66 + 4 * g) >> 28} << 8 * g;
    numbers.scale[0] = odd_bytes(nibbles);
  }
  static void group(const std::byte* block, size_t g, int8_t* to) {
    const uint32_t signs = four_at(block + 66 + 4 * g);
    for (size_t i = 0; i < 4; ++i) {
      const std::byte* codes = block + 2 + 8 * g + 2 * i;
      const uint64_t sizes = sizes_of_four(kQuadPoints256[byte_at(codes, 0)]) |
                             uint64_t{sizes_of_four(kQuadPoints256[byte_at(codes, 1)])} << 32;
      store_eight(with_signs(sizes, eight_signs(signs >> 7 * i & 127)), to + 8 * i);
    }
  }
};
static_assert(WeightFormat<Iq3Xxs>);

// [scale][codes: 64][ninth bits of codes: 8][signs: 32][scales of four bits: 4]
struct Iq3S : LatticeBlocks<Iq3S, 110, 32, 1> {
  static constexpr FormatId kId = FormatId::kIq3S;
  static constexpr std::string_view kName = "iq3_s";
  static constexpr int kGgufType = 21;
  static constexpr IntegerRange kIntegers{-15, 15};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    numbers.scale[0] = odd_bytes(spread_nibbles(four_at(block + 106)));
  }
  static void group(const std::byte* block, size_t g, int8_t* to) {
    const uint32_t ninth = static_cast<uint32_t>(byte_at(block, 66 + g));
    const auto sizes = [&](size_t i) {
      const uint32_t code = static_cast<uint32_t>(byte_at(block, 2 + 8 * g + i)) | (ninth >> i & 1) << 8;
      return uint64_t{odd_sizes_of_four(kQuadPoints512[code])};
    };
    for (size_t i = 0; i < 4; ++i) {
      const auto signs = static_cast<uint64_t>(byte_at(block, 74 + 4 * g + i));
      store_eight(with_signs(sizes(2 * i) | sizes(2 * i + 1) << 32, signs), to + 8 * i);
    }
  }
};
static_assert(WeightFormat<Iq3S>);

// Eight coordinates 0 to 2 as -1, 0 and 1, an eighth added or taken away: eight times that.
constexpr uint64_t shifted_eighths(uint16_t point, bool down) {
  constexpr uint64_t kSigns = 0x8080808080808080;
  const uint64_t less = down ? 0x0909090909090909 : 0x0707070707070707;
  return ((8 * spread_twos(point) | kSigns) - less) ^ kSigns;
}

// [scale][codes: 32][32 values: three upper bits of four codes, scale of three bits, which way: 2 bytes] * 8
struct Iq1S : LatticeBlocks<Iq1S, 50, 32, 8> {
  static constexpr FormatId kId = FormatId::kIq1S;
  static constexpr std::string_view kName = "iq1_s";
  static constexpr int kGgufType = 19;
  static constexpr IntegerRange kIntegers{-9, 9};

  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    uint64_t threes = 0;
    for (size_t g = 0; g < 8; ++g) threes |= uint64_t{half_bits_at(block + 34 + 2 * g) >> 12 & 7u} << 8 * g;
    numbers.scale[0] = odd_bytes(threes);
  }
  static void group(const std::byte* block, size_t g, int8_t* to) {
    const uint32_t upper = half_bits_at(block + 34 + 2 * g);
    for (size_t i = 0; i < 4; ++i) {
      const uint32_t code = static_cast<uint32_t>(byte_at(block, 2 + 4 * g + i)) | (upper >> 3 * i & 7) << 8;
      store_eight(shifted_eighths(kTernaryPoints[code], upper >> 15 != 0), to + 8 * i);
    }
  }
};
static_assert(WeightFormat<Iq1S>);

// Four numbers of three bits, each in a byte of its own.
constexpr uint64_t threes_of(uint32_t bits) { return spread_threes(bits & 0xfff); }

// [codes: 32][three upper bits and which way of two codes: 16][four scales of three bits, four bits of the
// block's scale above them: 2 bytes] * 4
struct Iq1M : LatticeBlocks<Iq1M, 56, 16, 8> {
  static constexpr FormatId kId = FormatId::kIq1M;
  static constexpr std::string_view kName = "iq1_m";
  static constexpr int kGgufType = 29;
  static constexpr IntegerRange kIntegers{-9, 9};

  static uint16_t scale_bits(const std::byte* block) {
    uint32_t bits = 0;
    for (size_t i = 0; i < 4; ++i) bits |= (half_bits_at(block + 48 + 2 * i) >> 12) << 4 * i;
    return static_cast<uint16_t>(bits);
  }
  static float scale_at(const std::byte* block) { return kScaleFactor * half_to_float(scale_bits(block)); }
  [[gnu::always_inline]] static void group_numbers(const std::byte* block, GroupNumbers& numbers) {
    for (size_t i = 0; i < 2; ++i)
      numbers.scale[i] = odd_bytes(threes_of(half_bits_at(block + 48 + 4 * i)) |
                                   threes_of(half_bits_at(block + 50 + 4 * i)) << 32);
  }
  static void group(const std::byte* block, size_t g, int8_t* to) {
    for (size_t i = 0; i < 4; ++i) {
      const uint32_t upper = static_cast<uint32_t>(nibble_at(block + 32 + 2 * g, i));
      const uint32_t code = static_cast<uint32_t>(byte_at(block, 4 * g + i)) | (upper & 7) << 8;
      store_eight(shifted_eighths(kTernaryPoints[code], (upper & 8) != 0), to + 8 * i);
    }
  }
};
static_assert(WeightFormat<Iq1M>);

}  // namespace ktmoe::formats
