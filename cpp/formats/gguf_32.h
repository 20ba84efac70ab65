// GGUF's formats whose blocks are 32 values that share a scale in float16, the first two bytes: Q4_0, Q4_1,
// Q5_0, Q5_1, Q8_0 and IQ4_NL. Byte i of 16 has the nibbles of values i and i + 16.
#ifndef KTMOE_FORMATS_GGUF_32_H_
#define KTMOE_FORMATS_GGUF_32_H_

#include "formats/blocks.h"

namespace ktmoe::formats {

template <class F, size_t kBytes>
using Block32 = Blocks<F, 32, kBytes, 32>;

// number = nibble - 8
struct Q4_0 : Block32<Q4_0, 18> {
  static constexpr FormatId kId = FormatId::kQ4_0;
  static constexpr std::string_view kName = "q4_0";
  static constexpr bool kHasOffset = false;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    values.scale[0] = half_at(block);
    split_nibbles<16>(block + 2, values.number, values.number + 16);
    for (int8_t& number : values.number) number = static_cast<int8_t>(number - 8);
  }
};
static_assert(WeightFormat<Q4_0>);

struct Q4_1 : Block32<Q4_1, 20> {
  static constexpr FormatId kId = FormatId::kQ4_1;
  static constexpr std::string_view kName = "q4_1";
  static constexpr bool kHasOffset = true;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    values.scale[0] = half_at(block);
    values.offset[0] = half_at(block + 2);
    split_nibbles<16>(block + 4, values.number, values.number + 16);
  }
};
static_assert(WeightFormat<Q4_1>);

// Nibbles, and 32 bits that stand above them.
[[gnu::always_inline]] inline void unpack_fives(const std::byte* high_bits, const std::byte* nibbles,
                                                int8_t* number) {
  split_nibbles<16>(nibbles, number, number + 16);
  for (size_t i = 0; i < 32; ++i)
    number[i] = static_cast<int8_t>(number[i] | (byte_at(high_bits, i / 8) >> (i % 8) & 1) << 4);
}

// number = five bits - 16
struct Q5_0 : Block32<Q5_0, 22> {
  static constexpr FormatId kId = FormatId::kQ5_0;
  static constexpr std::string_view kName = "q5_0";
  static constexpr bool kHasOffset = false;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    values.scale[0] = half_at(block);
    unpack_fives(block + 2, block + 6, values.number);
    for (int8_t& number : values.number) number = static_cast<int8_t>(number - 16);
  }
};
static_assert(WeightFormat<Q5_0>);

struct Q5_1 : Block32<Q5_1, 24> {
  static constexpr FormatId kId = FormatId::kQ5_1;
  static constexpr std::string_view kName = "q5_1";
  static constexpr bool kHasOffset = true;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    values.scale[0] = half_at(block);
    values.offset[0] = half_at(block + 2);
    unpack_fives(block + 4, block + 8, values.number);
  }
};
static_assert(WeightFormat<Q5_1>);

struct Q8_0 : Block32<Q8_0, 34> {
  static constexpr FormatId kId = FormatId::kQ8_0;
  static constexpr std::string_view kName = "q8_0";
  static constexpr bool kHasOffset = false;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    values.scale[0] = half_at(block);
    std::memcpy(values.number, block + 2, sizeof values.number);
  }
};
static_assert(WeightFormat<Q8_0>);

// The numbers that nibbles of IQ4_NL and IQ4_XS stand for: about those of a normal distribution.
inline constexpr BlockNumbers kNonLinear{
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};

struct Iq4Nl : Block32<Iq4Nl, 18> {
  static constexpr FormatId kId = FormatId::kIq4Nl;
  static constexpr std::string_view kName = "iq4_nl";
  static constexpr bool kHasOffset = false;
  static constexpr const BlockNumbers& kNumbers = kNonLinear;

  [[gnu::always_inline]] static void unpack(const std::byte* block, Values& values) {
    values.scale[0] = half_at(block);
    split_nibbles<16>(block + 2, values.number, values.number + 16);
  }
};
static_assert(WeightFormat<Iq4Nl>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_GGUF_32_H_
