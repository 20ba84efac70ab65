// MXFP4: E2M1 numbers; every 32 of a row share a separate power of two, E8M0.
#ifndef KTMOE_FORMATS_MXFP4_H_
#define KTMOE_FORMATS_MXFP4_H_

#include "core/align.h"
#include "formats/scaled.h"

namespace ktmoe::formats {

struct MxFp4 : ScaledNibbles<MxFp4> {
  static constexpr FormatId kId = FormatId::kMxFp4;
  static constexpr std::string_view kName = "mxfp4";
  static constexpr bool kHasChannelScale = false;
  static constexpr size_t kGroup = 32;
  static constexpr IntegerRange kIntegers{-12, 12};

  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup); }

  // Numbers are doubled, scales halved.
  static constexpr int8_t code(int nibble) { return e2m1_doubled(static_cast<uint8_t>(nibble)); }
  static constexpr auto kScaleValues = table_of_bytes([](uint8_t b) { return halved(e8m0_to_float(b)); });
  static constexpr float scale(const std::byte* scales, size_t k) {
    return kScaleValues[static_cast<uint8_t>(scales[k / kGroup])];
  }
};
static_assert(WeightFormat<MxFp4>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_MXFP4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <>
struct Unpack<formats::MxFp4> {
  using Format = formats::MxFp4;
  static constexpr bool kUsedAsStored = false;
  static KT_INLINE Floats8 scale_of_byte(const Ints8& bytes) { return half_of_e8m0(bytes); }
  struct Row : NibbleRow<Row, Format> {
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : NibbleRow<Row, Format>(w, n) {}
    template <class V = Vec>
    KT_INLINE typename V::Segment looked_up(const std::byte* nibbles, size_t k, size_t) const {
      const auto& numbers = kScaledNumbers<Format>.of[static_cast<uint8_t>(scales[k / Format::kGroup])];
      return Vec::look_up_segment(nibbles, kNibbleCodes<Format>.of, numbers);
    }
    template <class V = Vec>
      requires LooksUpTwo<V>
    KT_INLINE void two_segments(size_t k, typename V::Segment (&to)[2]) const {
      const auto& numbers = kScaledNumbers<Format>.of[static_cast<uint8_t>(scales[k / Format::kGroup])];
      V::look_up_two(data + k / 2, V::table_of(numbers), to);
    }
  };
};

#endif  // KT_TARGET_REGION
