// Common to formats with separate block scales: w = bf(number scale), with `F::scale(scales, k)` for column k
// of a row, or of the rows that share the scales.
#pragma once

#include "core/types.h"
#include "formats/format.h"
#include "formats/small_floats.h"

namespace ktmoe::formats {

// Whole numbers `F::code(nibble)`.
template <class F>
struct ScaledNibbles {
  static constexpr bool kIsInteger = false;
  static constexpr uint32_t kScaleRows = 1;

  static constexpr size_t row_bytes(size_t k) { return nibble_bytes(k); }
  static void decode(const WeightView& w, size_t n, float* out) {
    const std::byte* scales = w.block_scales_of(n, kScaleRows);
    for (size_t i = 0; i < w.k; ++i) {
      const auto number = static_cast<float>(F::code(nibble_at(w.row(n), i)));
      out[i] = to_float(to_bf16(number * F::scale(scales, i)));
    }
  }
};

// Numbers of E4M3, of which `kRows` rows share their scales.
template <class F, uint32_t kRows>
struct ScaledE4m3 {
  static constexpr bool kHasChannelScale = false, kIsInteger = false;
  static constexpr uint32_t kScaleRows = kRows;

  static constexpr size_t row_bytes(size_t k) { return k; }
  static void decode(const WeightView& w, size_t n, float* out) {
    const std::byte* scales = w.block_scales_of(n, kScaleRows);
    for (size_t i = 0; i < w.k; ++i) {
      const float number = kE4m3[static_cast<uint8_t>(w.row(n)[i])];
      out[i] = to_float(to_bf16(number * F::scale(scales, i)));
    }
  }
};

}  // namespace ktmoe::formats
