// MXFP4: numbers of E2M1, and every 32 of a row share a power of two, E8M0, which lies apart.
#ifndef KTMOE_FORMATS_MXFP4_H_
#define KTMOE_FORMATS_MXFP4_H_

#include <cstring>

#include "core/aligned_buffer.h"
#include "core/types.h"
#include "formats/format.h"
#include "formats/small_floats.h"

namespace ktmoe::formats {

struct MxFp4 {
  static constexpr FormatId kId = FormatId::kMxFp4;
  static constexpr std::string_view kName = "mxfp4";
  static constexpr bool kHasRowScale = false, kIsInteger = false;
  static constexpr uint32_t kScaleRows = 1;
  static constexpr size_t kGroup = 32;

  static constexpr size_t row_bytes(size_t k) { return div_up(k, 2); }
  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup); }

  // Numbers are doubled, scales halved.
  static constexpr int8_t code(int nibble) { return e2m1_doubled(static_cast<uint8_t>(nibble)); }
  static float scale(const std::byte* scales, size_t k) {
    return e8m0_to_float(static_cast<uint8_t>(scales[k / kGroup])) * 0.5f;
  }

  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t i = 0; i < w.k; ++i) {
      const int nibble = static_cast<int>(w.row(n)[i / 2]) >> (i % 2 * 4) & 15;
      out[i] = to_float(to_bf16(static_cast<float>(code(nibble)) * scale(w.scales_of(n, kScaleRows), i)));
    }
  }
};
static_assert(WeightFormat<MxFp4>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_MXFP4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once a target

// The numbers of a scale, by its byte.
struct MxFp4Numbers {
  Vec::Numbers of[256] = {};
  constexpr MxFp4Numbers() {
    for (int scale = 0; scale < 256; ++scale) {
      for (int nibble = 0; nibble < 16; ++nibble)
        of[scale].set(nibble, product_in_bf16(formats::MxFp4::code(nibble),
                                              e8m0_to_float(static_cast<uint8_t>(scale)) * 0.5f));
    }
  }
};
inline constexpr MxFp4Numbers kMxFp4Numbers;

template <>
struct Unpack<formats::MxFp4> {
  using Format = formats::MxFp4;
  static constexpr bool kAsStored = false;
  struct Row : NibbleRow<Row, Format::kGroup> {
    alignas(16) static constexpr int8_t kCodes[16] = {
        Format::code(0),  Format::code(1),  Format::code(2),  Format::code(3),
        Format::code(4),  Format::code(5),  Format::code(6),  Format::code(7),
        Format::code(8),  Format::code(9),  Format::code(10), Format::code(11),
        Format::code(12), Format::code(13), Format::code(14), Format::code(15)};
    const std::byte *data, *scales;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n)
        : data(w.row(n)), scales(w.scales_of(n, Format::kScaleRows)) {}
    KT_INLINE float scale(size_t k) const { return Format::scale(scales, k); }
    template <class V = Vec>
    KT_INLINE V::Segment looked_up(const std::byte* nibbles, size_t k, size_t) const {
      const auto& numbers = kMxFp4Numbers.of[static_cast<uint8_t>(scales[k / Format::kGroup])];
      return Vec::look_up_segment(nibbles, kCodes, numbers);
    }
  };
};

#endif  // KT_TARGET_REGION
