// GGUF's formats of plain numbers beside bf16, F16 and F32, which are rounded to bf16 on the way.
#ifndef KTMOE_FORMATS_GGUF_FLOATS_H_
#define KTMOE_FORMATS_GGUF_FLOATS_H_

#include "formats/blocks.h"

namespace ktmoe::formats {

// One number is a block.
template <class F, size_t kBytes>
struct PlainNumbers : NoBlockScales {
  static constexpr bool kHasChannelScale = false, kIsInteger = false;
  static constexpr size_t kBlock = 1;

  static constexpr size_t row_bytes(size_t k) { return k * kBytes; }
  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t i = 0; i < w.k; ++i) out[i] = to_float(to_bf16(F::value_at(w.row(n) + i * kBytes)));
  }
};

struct F16 : PlainNumbers<F16, 2> {
  static constexpr FormatId kId = FormatId::kF16;
  static constexpr std::string_view kName = "f16";
  static constexpr int kGgufType = 1;

  static float value_at(const std::byte* p) { return half_at(p); }
};
static_assert(WeightFormat<F16>);

struct F32 : PlainNumbers<F32, 4> {
  static constexpr FormatId kId = FormatId::kF32;
  static constexpr std::string_view kName = "f32";
  static constexpr int kGgufType = 0;

  static float value_at(const std::byte* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
};
static_assert(WeightFormat<F32>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_GGUF_FLOATS_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

template <>
struct Unpack<formats::F16> {
  static KT_INLINE Vec::Float load(const std::byte* p) { return Vec::load_half_at(p); }
};

template <>
struct Unpack<formats::F32> {
  static KT_INLINE Vec::Float load(const std::byte* p) { return Vec::load_f_at(p); }
};

#endif  // KT_TARGET_REGION
