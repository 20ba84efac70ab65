// NVFP4: numbers of E2M1, every 16 of a row share a scale of E4M3, which lies apart, and a matrix has a
// float32 scale, which is given as that of each of its rows. Number times scale of the group is exact in
// bf16.
#ifndef KTMOE_FORMATS_NVFP4_H_
#define KTMOE_FORMATS_NVFP4_H_

#include <cstring>

#include "core/aligned_buffer.h"
#include "core/types.h"
#include "formats/format.h"
#include "formats/small_floats.h"

namespace ktmoe::formats {

struct NvFp4 {
  static constexpr FormatId kId = FormatId::kNvFp4;
  static constexpr std::string_view kName = "nvfp4";
  static constexpr bool kHasRowScale = true, kIsInteger = false;
  static constexpr uint32_t kScaleRows = 1;
  static constexpr size_t kGroup = 16;

  static constexpr size_t row_bytes(size_t k) { return div_up(k, 2); }
  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup); }

  // Numbers are doubled, scales halved.
  static constexpr int8_t code(int nibble) { return e2m1_doubled(static_cast<uint8_t>(nibble)); }
  static float scale(const std::byte* scales, size_t k) {
    return kE4m3[static_cast<uint8_t>(scales[k / kGroup])] * 0.5f;
  }

  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t i = 0; i < w.k; ++i) {
      const int nibble = static_cast<int>(w.row(n)[i / 2]) >> (i % 2 * 4) & 15;
      out[i] = to_float(to_bf16(static_cast<float>(code(nibble)) * scale(w.scales_of(n, kScaleRows), i)));
    }
  }
};
static_assert(WeightFormat<NvFp4>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_NVFP4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once a target

// The numbers of a scale, by its byte.
struct NvFp4Numbers {
  Vec::Numbers of[256] = {};
  constexpr NvFp4Numbers() {
    for (int scale = 0; scale < 256; ++scale) {
      for (int nibble = 0; nibble < 16; ++nibble)
        of[scale].set(nibble, product_in_bf16(formats::NvFp4::code(nibble),
                                              e4m3_to_float(static_cast<uint8_t>(scale)) * 0.5f));
    }
  }
};
inline constexpr NvFp4Numbers kNvFp4Numbers;

template <>
struct Unpack<formats::NvFp4> {
  using Format = formats::NvFp4;
  static constexpr bool kAsStored = false;
  struct Row : NibbleRow<Row, Format::kGroup> {
    alignas(16) static constexpr int8_t kCodes[16] = {
        Format::code(0),  Format::code(1),  Format::code(2),  Format::code(3),
        Format::code(4),  Format::code(5),  Format::code(6),  Format::code(7),
        Format::code(8),  Format::code(9),  Format::code(10), Format::code(11),
        Format::code(12), Format::code(13), Format::code(14), Format::code(15)};
    const std::byte *data, *scales;
    float row_scale;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n)
        : data(w.row(n)), scales(w.scales_of(n, Format::kScaleRows)), row_scale(w.row_scale[n]) {}
    KT_INLINE float scale(size_t k) const { return Format::scale(scales, k); }
    KT_INLINE Vec::Segment weights(size_t k) const { return Vec::times(this->segment(k), row_scale); }
    KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const {
      return Vec::times(this->tail(k, count), row_scale);
    }
    // The second group of a segment may lie behind the row, where numbers are multiplied by zeros.
    template <class V = Vec>
    KT_INLINE V::Segment looked_up(const std::byte* nibbles, size_t k, size_t count) const {
      const std::byte* of_group = scales + k / Format::kGroup;
      const auto first = static_cast<uint8_t>(of_group[0]);
      const auto second = count > Format::kGroup ? static_cast<uint8_t>(of_group[1]) : first;
      return V::look_up_two(nibbles, kNvFp4Numbers.of[first], kNvFp4Numbers.of[second]);
    }
  };
};

#endif  // KT_TARGET_REGION
