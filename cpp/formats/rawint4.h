// int4 as compressed-tensors packs it: w = bf(q scale), a nibble is q + 8, and every 32 of a row share a
// scale in bf16, which lies apart.
#ifndef KTMOE_FORMATS_RAWINT4_H_
#define KTMOE_FORMATS_RAWINT4_H_

#include <cstring>

#include "core/aligned_buffer.h"
#include "formats/scaled.h"

namespace ktmoe::formats {

struct RawInt4 : ScaledNibbles<RawInt4> {
  static constexpr FormatId kId = FormatId::kRawInt4;
  static constexpr std::string_view kName = "rawint4";
  static constexpr bool kHasRowScale = false;
  static constexpr size_t kGroup = 32;

  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup) * sizeof(bf16); }

  // A nibble is its number and 8.
  static constexpr int8_t code(int nibble) { return static_cast<int8_t>(nibble - 8); }
  static float scale(const std::byte* scales, size_t k) {
    bf16 value;
    std::memcpy(&value, scales + k / kGroup * sizeof value, sizeof value);
    return to_float(value);
  }
};
static_assert(WeightFormat<RawInt4>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_RAWINT4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once a target

// The numbers of scales from 0.5 to below 2, by the lower byte of their bf16: those of others are powers of
// four times these.
struct RawInt4Numbers {
  static constexpr int kUpperByte = 0x3f;
  Vec::Numbers of[256] = {};
  constexpr RawInt4Numbers() {
    for (int low = 0; low < 256; ++low) {
      const float scale = to_float(bf16{static_cast<uint16_t>(kUpperByte << 8 | low)});
      for (int nibble = 0; nibble < 16; ++nibble)
        of[low].set(nibble, to_bf16(static_cast<float>(formats::RawInt4::code(nibble)) * scale).bits);
    }
  }
};
inline constexpr RawInt4Numbers kRawInt4Numbers;

template <>
struct Unpack<formats::RawInt4> {
  using Format = formats::RawInt4;
  static constexpr bool kAsStored = false;
  struct Row : NibbleRow<Row, Format> {
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : NibbleRow<Row, Format>(w, n) {}
    template <class V = Vec>
    KT_INLINE typename V::Segment looked_up(const std::byte* nibbles, size_t k, size_t count) const {
      const std::byte* scale = scales + k / Format::kGroup * sizeof(bf16);
      const int low = static_cast<int>(scale[0]), high = static_cast<int>(scale[1]);
      // Scales whose multiples are not all normal numbers: zero, and beyond 2^120.
      if ((high & 127) < 1 || (high & 127) > 123) return this->by_codes(nibbles, k, count);
      return V::template look_up_shifted<8>(nibbles, kRawInt4Numbers.of[low],
                                            high - RawInt4Numbers::kUpperByte);
    }
  };
};

#endif  // KT_TARGET_REGION
