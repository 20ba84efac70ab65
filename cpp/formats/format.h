// What a weight format is: how the rows of a weight matrix are encoded. One header a format, one line in
// formats.inc; methods, kernels, bindings and tests follow from that list.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace ktmoe {

// One expert's weight matrix [N, K] as it lies in the checkpoint. Rows are output neurons, K is contiguous
// within a row; rows may lie apart (interleaved or fused projections), so the stride is its own.
struct WeightView {
  const std::byte* data = nullptr;
  ptrdiff_t row_stride_bytes = 0;
  uint32_t k = 0;                    // elements of a row
  const float* row_scale = nullptr;  // a value a row, of formats that have one

  const std::byte* row(size_t n) const { return data + static_cast<ptrdiff_t>(n) * row_stride_bytes; }

  // The rows from n on, row n called 0.
  WeightView from(size_t n) const {
    return {row(n), row_stride_bytes, k, row_scale ? row_scale + n : nullptr};
  }
  // The same rows, the first of them called n.
  WeightView numbered_from(size_t n) const {
    return {data - static_cast<ptrdiff_t>(n) * row_stride_bytes, row_stride_bytes, k,
            row_scale ? row_scale - n : nullptr};
  }
};

enum class FormatId : uint8_t {
#define KT_FORMAT(id, type) id,
#include "formats/formats.inc"
#undef KT_FORMAT
  kCount
};

inline constexpr size_t kNumFormats = static_cast<size_t>(FormatId::kCount);

// A format F provides, all static:
//   FormatId kId; std::string_view kName;
//   size_t row_bytes(size_t k)                      bytes of a row of k values
//   void decode(const std::byte* row, size_t k, float* out)    the scalar truth, before any row scale
//   bool kHasRowScale       a weight is its decoded value times a float32 of its row; decoded values are then
//                           exact in bf16
//   bool kIsInteger         decoded values are whole numbers from -127 to 127: integer products take them
// and, for the target regions (kernels/targets), a specialisation Unpack<F> that yields the k-th segment of a
// row in registers, in the element order of the policy it is given.
template <class F>
concept WeightFormat = requires(const std::byte* row, size_t k, float* out) {
  { F::kId } -> std::convertible_to<FormatId>;
  { F::kName } -> std::convertible_to<std::string_view>;
  { F::row_bytes(k) } -> std::same_as<size_t>;
  F::decode(row, k, out);
  { F::kHasRowScale } -> std::convertible_to<bool>;
  { F::kIsInteger } -> std::convertible_to<bool>;
};

}  // namespace ktmoe
