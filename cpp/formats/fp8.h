// E4M3 numbers with scales: one float32 per block of 128 x 128 (FP8), one float32 per row (FP8_PERCHANNEL),
// or a power of two, E8M0, per group of 32 in a row (MXFP8). Block and group scales are separate arrays.
#ifndef KTMOE_FORMATS_FP8_H_
#define KTMOE_FORMATS_FP8_H_

#include <cstring>

#include "core/align.h"
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

struct Fp8Row : NoBlockScales {
  static constexpr FormatId kId = FormatId::kFp8Row;
  static constexpr std::string_view kName = "fp8_perchannel";
  static constexpr bool kHasChannelScale = true, kIsInteger = false;

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

// How an instruction set decodes E4M3: formats/e4m3 has one file for each, which defines `E4m3`.
template <class Decoder, class V = Vec>
concept E4m3Decoder = requires(const std::byte* p, float scale) {
  { Decoder::segment(p, scale) } -> std::same_as<typename V::Segment>;  // bf(x scale) of kStep numbers
  { Decoder::kDecodesTiles } -> std::convertible_to<bool>;              // E4m3TileDecoder
};
// Columns [k, k + kStep) of 16 rows at a time, of decoders with kDecodesTiles. Of each row a cache line
// `line` bytes behind its beginning is prefetched; -1: none.
template <class Decoder>
concept E4m3TileDecoder =
    requires(const WeightView& rows, size_t k, float scale, size_t group, std::byte* to, ptrdiff_t line) {
      Decoder::decode_tile(rows, k, scale, to, line);            // the rows share a scale
      Decoder::decode_tile_of_groups(rows, k, group, to, line);  // E8M0 per `group` elements of a row
    };
static_assert(E4m3Decoder<E4m3> && (!E4m3::kDecodesTiles || E4m3TileDecoder<E4m3>));

// A row of E4M3: what follows from its `data` and `scale(k)`.
template <class Row>
struct E4m3Row {
  KT_INLINE const Row& row() const { return static_cast<const Row&>(*this); }
  KT_INLINE Vec::Segment segment(size_t k) const { return E4m3::segment(row().data + k, row().scale(k)); }
  KT_INLINE Vec::Segment tail(size_t k, size_t count) const { return tail(k, count, row().scale(k)); }
  KT_INLINE Vec::Segment tail(size_t k, size_t count, float scale) const {
    std::byte full[Vec::kStep] = {};
    std::memcpy(full, row().data + k, count);
    return E4m3::segment(full, scale);
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
        : data(w.row(n)), scales(w.block_scales_of(n, Scaled::kScaleRows)) {}
    KT_INLINE float scale(size_t k) const { return Scaled::scale(scales, k); }
  };
};

template <>
struct Unpack<formats::Fp8> : UnpackE4m3<formats::Fp8> {
  // The rows of a tile share a scale, as tiles do not straddle blocks.
  template <class Decoder = E4m3>
  static KT_INLINE void decode_tile(const WeightView& rows, size_t k, std::byte* to, ptrdiff_t line)
    requires Decoder::kDecodesTiles
  {
    const float scale = formats::Fp8::scale(rows.block_scales_of(0, formats::Fp8::kScaleRows), k);
    Decoder::decode_tile(rows, k, scale, to, line);
  }
};

template <>
struct Unpack<formats::MxFp8> : UnpackE4m3<formats::MxFp8> {
  template <class Decoder = E4m3>
  static KT_INLINE void decode_tile(const WeightView& rows, size_t k, std::byte* to, ptrdiff_t line)
    requires Decoder::kDecodesTiles
  {
    Decoder::decode_tile_of_groups(rows, k, formats::MxFp8::kGroup, to, line);
  }
};

template <>
struct Unpack<formats::Fp8Row> {
  static constexpr bool kUsedAsStored = false;
  template <class Decoder = E4m3>
  static KT_INLINE void decode_tile(const WeightView& rows, size_t k, std::byte* to, ptrdiff_t line)
    requires Decoder::kDecodesTiles
  {
    Decoder::decode_tile(rows, k, 1.0f, to, line);
  }
  struct Row : E4m3Row<Row> {
    const std::byte* data;
    float channel_scale;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : data(w.row(n)), channel_scale(w.channel_scale[n]) {}
    KT_INLINE float scale(size_t) const { return 1.0f; }
    KT_INLINE Vec::Segment weights(size_t k) const { return E4m3::segment(data + k, channel_scale); }
    KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const {
      return this->tail(k, count, channel_scale);
    }
  };
};

#endif  // KT_TARGET_REGION
