// The format of unquantized checkpoints: a row is its bfloat16 values, one after the other.
#ifndef KTMOE_FORMATS_BF16_H_
#define KTMOE_FORMATS_BF16_H_

#include <cstring>

#include "core/types.h"
#include "formats/format.h"

namespace ktmoe::formats {

struct Bf16 : NoBlockScales {
  static constexpr FormatId kId = FormatId::kBf16;
  static constexpr std::string_view kName = "bf16";
  static constexpr int kGgufType = 30;
  static constexpr bool kHasChannelScale = false, kIsInteger = false;

  static constexpr size_t row_bytes(size_t k) { return k * sizeof(bf16); }

  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t i = 0; i < w.k; ++i) {
      bf16 value;
      std::memcpy(&value, w.row(n) + i * sizeof value, sizeof value);
      out[i] = to_float(value);
    }
  }
};
static_assert(WeightFormat<Bf16>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_BF16_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

// bf16 rows need no unpacking: a segment is loaded directly.
template <>
struct Unpack<formats::Bf16> {
  static constexpr bool kUsedAsStored = true;
  struct Row {
    const std::byte* data;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n) : data(w.row(n)) {}
    KT_INLINE Vec::Segment segment(size_t k) const { return Vec::load(data + k * sizeof(bf16)); }
    KT_INLINE Vec::Segment tail(size_t k, size_t count) const {
      return Vec::load_partial(data + k * sizeof(bf16), count);
    }
    KT_INLINE Vec::Segment weights(size_t k) const { return segment(k); }
    KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const { return tail(k, count); }
  };
};

#endif  // KT_TARGET_REGION
