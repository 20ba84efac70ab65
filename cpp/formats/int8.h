// int8 codes from -127 to 127. With one scale per row, w = channel_scale * code, a row is its codes; with one
// scale per 32 codes, w = bf(code * scale), a row is its codes and then its scales, little-endian float32
// at any alignment.
#ifndef KTMOE_FORMATS_INT8_H_
#define KTMOE_FORMATS_INT8_H_

#include <cstring>

#include "core/align.h"
#include "core/types.h"
#include "formats/format.h"

namespace ktmoe::formats {

struct Int8 : NoBlockScales {
  static constexpr FormatId kId = FormatId::kInt8;
  static constexpr std::string_view kName = "int8";
  static constexpr bool kHasChannelScale = true, kIsInteger = true;
  static constexpr IntegerRange kIntegers{-128, 127};

  static constexpr size_t row_bytes(size_t k) { return k; }

  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t i = 0; i < w.k; ++i) out[i] = static_cast<float>(static_cast<int8_t>(w.row(n)[i]));
  }
};
static_assert(WeightFormat<Int8>);

struct Int8Group32 : NoBlockScales {
  static constexpr FormatId kId = FormatId::kInt8Group32;
  static constexpr std::string_view kName = "int8_group32";
  static constexpr bool kHasChannelScale = false, kIsInteger = false;
  static constexpr size_t kGroup = 32;
  static constexpr IntegerRange kIntegers{-128, 127};

  static constexpr size_t code_bytes(size_t k) { return k; }
  static constexpr size_t row_bytes(size_t k) { return code_bytes(k) + div_up(k, kGroup) * sizeof(float); }
  static float scale(const std::byte* row, size_t k, size_t i) {
    float scale;
    std::memcpy(&scale, row + k + i / kGroup * sizeof scale, sizeof scale);
    return scale;
  }

  static void decode(const WeightView& w, size_t n, float* out) {
    const std::byte* row = w.row(n);
    for (size_t i = 0; i < w.k; ++i)
      out[i] = to_float(to_bf16(static_cast<float>(static_cast<int8_t>(row[i])) * scale(row, w.k, i)));
  }
};
static_assert(WeightFormat<Int8Group32>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_INT8_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <>
struct Unpack<formats::Int8> {
  static constexpr bool kUsedAsStored = false, kBytesUsedAsStored = true;
  struct Row : CodeRow<Row> {
    const std::byte* data;
    float scale;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : data(w.row(n)), scale(w.channel_scale[n]) {}
    KT_INLINE Vec::Codes codes(size_t k) const { return Vec::load_codes(data + k); }
    KT_INLINE Vec::Codes codes_tail(size_t k, size_t count) const {
      return Vec::load_codes_partial(data + k, count);
    }
    KT_INLINE Vec::Bytes bytes(size_t k) const { return Vec::load_bytes(data + k); }
    KT_INLINE Vec::Bytes bytes_tail(size_t k, size_t count) const {
      return Vec::load_bytes_partial(data + k, count);
    }
  };
};

template <>
struct Unpack<formats::Int8Group32> {
  static constexpr bool kUsedAsStored = false;
  struct Row {
    const std::byte* data;
    size_t num;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : data(w.row(n)), num(w.k) {}
    KT_INLINE float scale(size_t k) const { return formats::Int8Group32::scale(data, num, k); }
    KT_INLINE Vec::Segment segment(size_t k) const {
      return Vec::to_segment(Vec::load_codes(data + k), scale(k));
    }
    KT_INLINE Vec::Segment tail(size_t k, size_t count) const {
      return Vec::to_segment(Vec::load_codes_partial(data + k, count), scale(k));
    }
    KT_INLINE Vec::Segment weights(size_t k) const { return segment(k); }
    KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const { return tail(k, count); }
  };
};

#endif  // KT_TARGET_REGION
