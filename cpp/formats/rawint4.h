// int4 as compressed-tensors packs it: w = bf(q scale), a nibble is q + 8, and a group of a row shares a
// separate bf16 scale.
#ifndef KTMOE_FORMATS_RAWINT4_H_
#define KTMOE_FORMATS_RAWINT4_H_

#include <cstring>

#include "core/align.h"
#include "formats/scaled.h"

namespace ktmoe::formats {

template <size_t kSize>
struct RawInt4 : ScaledNibbles<RawInt4<kSize>> {
  static constexpr bool kHasChannelScale = false;
  static constexpr size_t kGroup = kSize;
  static constexpr IntegerRange kIntegers{-8, 7};

  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup) * sizeof(bf16); }

  // A nibble is its number and 8.
  static constexpr int8_t code(int nibble) { return static_cast<int8_t>(nibble - 8); }
  static float scale(const std::byte* scales, size_t k) {
    bf16 value;
    std::memcpy(&value, scales + k / kGroup * sizeof value, sizeof value);
    return to_float(value);
  }
};
struct RawInt4Group32 : RawInt4<32> {
  static constexpr FormatId kId = FormatId::kRawInt4Group32;
  static constexpr std::string_view kName = "rawint4_group32";
};
struct RawInt4Group64 : RawInt4<64> {
  static constexpr FormatId kId = FormatId::kRawInt4Group64;
  static constexpr std::string_view kName = "rawint4_group64";
};
struct RawInt4Group128 : RawInt4<128> {
  static constexpr FormatId kId = FormatId::kRawInt4Group128;
  static constexpr std::string_view kName = "rawint4_group128";
};
static_assert(WeightFormat<RawInt4Group32>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_RAWINT4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <class Format>
struct UnpackRawInt4 {
  static constexpr bool kUsedAsStored = false;
  struct Row : NibbleRow<Row, Format> {
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : NibbleRow<Row, Format>(w, n) {}
    template <class V = Vec>
    KT_INLINE typename V::Segment looked_up(const std::byte* nibbles, size_t k, size_t) const {
      typename V::Float numbers[16 / V::kWidth];
      scaled_numbers<kFromMinusEight>(Format::scale(this->scales, k), numbers);
      return V::look_up_floats(nibbles, numbers);
    }
    template <class V = Vec>
      requires LooksUpTwo<V>
    KT_INLINE void two_segments(size_t k, typename V::Segment (&to)[2]) const {
      typename V::Float numbers[16 / V::kWidth];
      scaled_numbers<kFromMinusEight>(Format::scale(this->scales, k), numbers);
      V::look_up_two(this->data + k / 2, V::table_of(numbers), to);
    }
  };
};
template <>
struct Unpack<formats::RawInt4Group32> : UnpackRawInt4<formats::RawInt4Group32> {};
template <>
struct Unpack<formats::RawInt4Group64> : UnpackRawInt4<formats::RawInt4Group64> {};
template <>
struct Unpack<formats::RawInt4Group128> : UnpackRawInt4<formats::RawInt4Group128> {};

#endif  // KT_TARGET_REGION
