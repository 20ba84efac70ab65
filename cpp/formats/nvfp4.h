// NVFP4: E2M1 numbers with one E4M3 scale per group of 16 in a row, in a separate array, and one float32
// scale per matrix, which is passed as the channel scale of each of its rows. A number times its group's
// scale is exact in bf16.
#ifndef KTMOE_FORMATS_NVFP4_H_
#define KTMOE_FORMATS_NVFP4_H_

#include "core/align.h"
#include "formats/scaled.h"

namespace ktmoe::formats {

struct NvFp4 : ScaledNibbles<NvFp4> {
  static constexpr FormatId kId = FormatId::kNvFp4;
  static constexpr std::string_view kName = "nvfp4";
  static constexpr bool kHasChannelScale = true;
  static constexpr size_t kGroup = 16;
  static constexpr IntegerRange kIntegers{-12, 12};

  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup); }

  // Numbers are doubled, scales halved.
  static constexpr int8_t code(int nibble) { return e2m1_doubled(static_cast<uint8_t>(nibble)); }
  static constexpr auto kScaleValues = table_of_bytes([](uint8_t b) { return halved(kE4m3[b]); });
  static constexpr float scale(const std::byte* scales, size_t k) {
    return kScaleValues[static_cast<uint8_t>(scales[k / kGroup])];
  }
};
static_assert(WeightFormat<NvFp4>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_NVFP4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <>
struct Unpack<formats::NvFp4> {
  using Format = formats::NvFp4;
  static constexpr bool kUsedAsStored = false;
  static KT_INLINE Floats8 scale_of_byte(const Ints8& bytes) { return half_of_e4m3(bytes); }
  struct Row : NibbleRow<Row, Format> {
    float channel_scale;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n)
        : NibbleRow<Row, Format>(w, n), channel_scale(w.channel_scale[n]) {}
    KT_INLINE Vec::Segment weights(size_t k) const { return Vec::times(this->segment(k), channel_scale); }
    KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const {
      return Vec::times(this->tail(k, count), channel_scale);
    }
    // The second group of a segment may lie behind the end of the row, where activations are zeros.
    // look_up_two is defined in formats/nvfp4, for the instruction sets that call this.
    template <class V = Vec>
    KT_INLINE typename V::Segment looked_up(const std::byte* nibbles, size_t k, size_t count) const {
      const std::byte* of_group = scales + k / Format::kGroup;
      const auto first = static_cast<uint8_t>(of_group[0]);
      const typename V::Numbers(&numbers)[256] = kScaledNumbers<Format>.of;
      if constexpr (V::kStep <= Format::kGroup) {
        return V::look_up_segment(nibbles, kNibbleCodes<Format>.of, numbers[first]);
      } else {
        const auto second = count > Format::kGroup ? static_cast<uint8_t>(of_group[1]) : first;
        return look_up_two(nibbles, numbers[first], numbers[second]);
      }
    }
  };
};

#endif  // KT_TARGET_REGION
