// Numbers of E4M3 with scales: one float32 for every block of 128 x 128 (FP8), one for every row
// (FP8_PERCHANNEL), or a power of two, E8M0, for every 32 of a row (MXFP8). Those of blocks and groups lie
// apart.
#ifndef KTMOE_FORMATS_FP8_H_
#define KTMOE_FORMATS_FP8_H_

#include <cstring>

#include "core/aligned_buffer.h"
#include "formats/scaled.h"

namespace ktmoe::formats {

struct Fp8 : ScaledE4m3<Fp8, 128> {
  static constexpr FormatId kId = FormatId::kFp8;
  static constexpr std::string_view kName = "fp8";
  static constexpr size_t kGroup = 128;

  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup) * sizeof(float); }
  static float scale(const std::byte* scales, size_t k) {
    float value;
    std::memcpy(&value, scales + k / kGroup * sizeof value, sizeof value);
    return value;
  }
};
static_assert(WeightFormat<Fp8>);

struct Fp8Row : NoScalesApart {
  static constexpr FormatId kId = FormatId::kFp8Row;
  static constexpr std::string_view kName = "fp8_perchannel";
  static constexpr bool kHasRowScale = true, kIsInteger = false;

  static constexpr size_t row_bytes(size_t k) { return k; }

  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t i = 0; i < w.k; ++i) out[i] = kE4m3[static_cast<uint8_t>(w.row(n)[i])];
  }
};
static_assert(WeightFormat<Fp8Row>);

struct MxFp8 : ScaledE4m3<MxFp8, 1> {
  static constexpr FormatId kId = FormatId::kMxFp8;
  static constexpr std::string_view kName = "mxfp8";
  static constexpr size_t kGroup = 32;

  static constexpr size_t scale_bytes(size_t k) { return div_up(k, kGroup); }
  static float scale(const std::byte* scales, size_t k) {
    return e8m0_to_float(static_cast<uint8_t>(scales[k / kGroup]));
  }
};
static_assert(WeightFormat<MxFp8>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_FP8_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once a target

// A row of E4M3: what follows from its `data` and `scale(k)`.
template <class Row>
struct E4m3Row {
  KT_INLINE const Row& row() const { return static_cast<const Row&>(*this); }
  KT_INLINE Vec::Segment segment(size_t k) const { return Vec::e4m3_segment(row().data + k, row().scale(k)); }
  KT_INLINE Vec::Segment tail(size_t k, size_t count) const { return tail(k, count, row().scale(k)); }
  KT_INLINE Vec::Segment tail(size_t k, size_t count, float scale) const {
    std::byte full[Vec::kStep] = {};
    std::memcpy(full, row().data + k, count);
    return Vec::e4m3_segment(full, scale);
  }
  KT_INLINE Vec::Segment weights(size_t k) const { return segment(k); }
  KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const { return tail(k, count); }
};

template <class Scaled>
struct UnpackE4m3 {
  static constexpr bool kUsedAsStored = false;
  struct Row : E4m3Row<Row> {
    const std::byte *data, *scales;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n)
        : data(w.row(n)), scales(w.scales_of(n, Scaled::kScaleRows)) {}
    KT_INLINE float scale(size_t k) const { return Scaled::scale(scales, k); }
  };
};
inline constexpr uint32_t kRowsOfTile = 16;

// A tile of rows by a table of the numbers times its scale: rows share it, as tiles do not straddle blocks.
template <class V>
KT_INLINE void decode_e4m3_tile(const WeightView& rows, size_t k, float scale, std::byte* to, ptrdiff_t line)
  requires V::kLooksUpScaled
{
  constexpr size_t kRowBytes = V::kStep * sizeof(bf16);
  const typename V::E4m3Table table(scale);
  const std::byte* row = rows.data;
  const ptrdiff_t stride = rows.row_stride_bytes;
  for (uint32_t r = 0; r < kRowsOfTile; r += 2, row += 2 * stride, to += 2 * kRowBytes) {
    if (line >= 0) {
      __builtin_prefetch(row + line, 0, 2);
      __builtin_prefetch(row + stride + line, 0, 2);
    }
    table.store(row + k, row + stride + k, to, to + kRowBytes);
  }
}

template <>
struct Unpack<formats::Fp8> : UnpackE4m3<formats::Fp8> {
  template <class V = Vec>
  static KT_INLINE void decode_tile(const WeightView& rows, size_t k, std::byte* to, ptrdiff_t line)
    requires V::kLooksUpScaled
  {
    const float scale = formats::Fp8::scale(rows.scales_of(0, formats::Fp8::kScaleRows), k);
    decode_e4m3_tile<V>(rows, k, scale, to, line);
  }
};
// Numbers are from 2^-9 to below 2^9: scales from 2^-117 on leave them normal, and those up to 2^117 finite.
template <>
struct Unpack<formats::MxFp8> : UnpackE4m3<formats::MxFp8> {
  template <class V = Vec>
  static KT_INLINE void decode_tile(const WeightView& rows, size_t k, std::byte* to, ptrdiff_t line)
    requires V::kLooksUpScaled
  {
    constexpr size_t kRowBytes = V::kStep * sizeof(bf16);
    const typename V::E4m3Table table(1.0f);
    const std::byte *row = rows.data, *scale = rows.scales_of(0, 1) + k / formats::MxFp8::kGroup;
    const ptrdiff_t stride = rows.row_stride_bytes, scales_stride = rows.scales_stride_bytes;
    for (uint32_t r = 0; r < kRowsOfTile; r += 2) {
      if (line >= 0) {
        __builtin_prefetch(row + line, 0, 2);
        __builtin_prefetch(row + stride + line, 0, 2);
      }
      const int power0 = static_cast<int>(scale[0]) - 127,
                power1 = static_cast<int>(scale[scales_stride]) - 127;
      if (power0 >= -117 && power0 <= 117 && power1 >= -117 && power1 <= 117) {
        table.store(row + k, row + stride + k, power0, power1, to, to + kRowBytes);
      } else {
        V::store(to, V::e4m3_segment(row + k, e8m0_to_float(static_cast<uint8_t>(scale[0]))));
        V::store(to + kRowBytes, V::e4m3_segment(row + stride + k,
                                                 e8m0_to_float(static_cast<uint8_t>(scale[scales_stride]))));
      }
      row += 2 * stride, scale += 2 * scales_stride, to += 2 * kRowBytes;
    }
  }
};

template <>
struct Unpack<formats::Fp8Row> {
  static constexpr bool kUsedAsStored = false;
  template <class V = Vec>
  static KT_INLINE void decode_tile(const WeightView& rows, size_t k, std::byte* to, ptrdiff_t line)
    requires V::kLooksUpScaled
  {
    decode_e4m3_tile<V>(rows, k, 1.0f, to, line);
  }
  struct Row : E4m3Row<Row> {
    const std::byte* data;
    float row_scale;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : data(w.row(n)), row_scale(w.row_scale[n]) {}
    KT_INLINE float scale(size_t) const { return 1.0f; }
    KT_INLINE Vec::Segment weights(size_t k) const { return Vec::e4m3_segment(data + k, row_scale); }
    KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const {
      return this->tail(k, count, row_scale);
    }
  };
};

#endif  // KT_TARGET_REGION
