// What a weight format is: how the rows of a weight matrix are encoded. One header per format, one line in
// formats.inc; methods, kernels, bindings and tests follow from that list.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace ktmoe {

enum class FormatId : uint8_t {
#define KT_FORMAT(id, type) id,
#include "formats/formats.inc"
#undef KT_FORMAT
  kCount
};

inline constexpr size_t kNumFormats = static_cast<size_t>(FormatId::kCount);

// One expert's weight matrix [N, K] as stored in the checkpoint. Rows are output neurons, K is contiguous
// within a row; rows may be strided (interleaved or fused projections), so the row stride is a separate
// field.
struct WeightView {
  const std::byte* data = nullptr;
  ptrdiff_t row_stride_bytes = 0;
  uint32_t k = 0;                           // elements of a row
  const float* channel_scale = nullptr;     // one value per row, if the format has it
  const std::byte* block_scales = nullptr;  // rows of separate block scales, if the format has them
  ptrdiff_t block_scales_stride_bytes = 0;
  uint32_t block_scales_row = 0;  // number of row 0 within the matrix: a row of scales serves several rows
  FormatId format = FormatId::kBf16;

  const std::byte* row(size_t n) const { return data + static_cast<ptrdiff_t>(n) * row_stride_bytes; }
  // The block scales of row n; one row of scales serves `rows` rows of the matrix.
  const std::byte* block_scales_of(size_t n, uint32_t rows) const {
    const uint32_t numbered = block_scales_row + static_cast<uint32_t>(n);  // modulo 2^32, see numbered_from
    return block_scales + static_cast<ptrdiff_t>(numbered / rows) * block_scales_stride_bytes;
  }

  // The rows from n on, row n numbered 0.
  WeightView from(size_t n) const {
    WeightView rest = *this;
    rest.data = row(n);
    if (channel_scale) rest.channel_scale += n;
    rest.block_scales_row += static_cast<uint32_t>(n);
    return rest;
  }
  // In place of from(1).
  void next_row() {
    data += row_stride_bytes;
    if (channel_scale) ++channel_scale;
    ++block_scales_row;
  }
  // The same rows, the first numbered n.
  WeightView numbered_from(size_t n) const {
    WeightView same = *this;
    same.data -= static_cast<ptrdiff_t>(n) * row_stride_bytes;
    if (channel_scale) same.channel_scale -= n;
    same.block_scales_row -= static_cast<uint32_t>(n);  // modulo 2^32, as n is added again
    return same;
  }
};

// Rows of nibbles: two per byte, the low one first.
constexpr size_t nibble_bytes(size_t k) { return (k + 1) / 2; }
constexpr int nibble_at(const std::byte* row, size_t i) {
  return static_cast<int>(row[i / 2]) >> (i % 2 * 4) & 15;
}

// The integers that the values of a format are made of lie in [least, most].
struct IntegerRange {
  int least, most;
};

// Values of nibbles: numbers from -8 or from 0 on.
alignas(16) inline constexpr int8_t kFromMinusEight[16] = {-8, -7, -6, -5, -4, -3, -2, -1,
                                                           0,  1,  2,  3,  4,  5,  6,  7};
alignas(16) inline constexpr int8_t kFromZero[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// A format F provides, all static:
//   FormatId kId; std::string_view kName;
//   size_t row_bytes(size_t k)                      bytes of a row of k values
//   uint32_t kScaleRows     rows of the matrix that share one row of separate block scales; 0: none
//   size_t scale_bytes(size_t k)                    bytes of a row of those scales
//   void decode(const WeightView& w, size_t n, float* out)    row n, the scalar reference, before the
//                           channel scale
//   bool kHasChannelScale       a weight is its decoded value times a float32 of its row; decoded values are
//                           then exact in bf16
//   bool kIsInteger         decoded values are whole numbers from -127 to 127: integer products take them
//   IntegerRange kIntegers  optional: values are integers in this range times scales, and products with
//                           activations quantized in blocks take them (kernels/contract_int8.h)
// and, for the target regions (kernels/targets), a specialization Unpack<F> that yields the k-th segment of a
// row in registers, in the element order of the policy it is given.
//
// A row of a block format, which also has `kBlock`, is whole blocks of so many values (blocks.h). Otherwise
// `kGroup`, if present, is the number of values of a row that share a scale, and
//   size_t code_bytes(size_t k)                     bytes of a row's codes, when scales follow in the row
//
// `NoBlockScales` provides these two members for formats without separate block scales.
struct NoBlockScales {
  static constexpr uint32_t kScaleRows = 0;
  static constexpr size_t scale_bytes(size_t) { return 0; }
};

// Products with activations quantized in blocks take it.
template <class F>
concept IntegerFormat = requires {
  { F::kIntegers } -> std::convertible_to<IntegerRange>;
};
// Activations that share a scale in those products.
template <IntegerFormat F>
constexpr uint32_t activation_block() {
  if constexpr (requires { F::kBlock; }) return F::kBlock == 256 ? 256 : 128;
  return 128;
}

template <class F>
concept WeightFormat = requires(const WeightView& w, size_t k, float* out) {
  { F::kId } -> std::convertible_to<FormatId>;
  { F::kName } -> std::convertible_to<std::string_view>;
  { F::row_bytes(k) } -> std::same_as<size_t>;
  { F::kScaleRows } -> std::convertible_to<uint32_t>;
  { F::scale_bytes(k) } -> std::same_as<size_t>;
  F::decode(w, k, out);
  { F::kHasChannelScale } -> std::convertible_to<bool>;
  { F::kIsInteger } -> std::convertible_to<bool>;
};

}  // namespace ktmoe
