// Floating point numbers of a byte and less, as the OCP formats define them: E4M3 (no infinity, all ones is
// NaN), E2M1, and E8M0, a power of two (255 is NaN).
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/types.h"

namespace ktmoe {

constexpr float e4m3_to_float(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 127) == 127) return std::numeric_limits<float>::quiet_NaN();
  // Of exponent 0 the leading one is not there.
  float size = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa);
  const int shift = (exponent == 0 ? 1 : exponent) - 10;
  size *= std::bit_cast<float>(static_cast<uint32_t>(127 + shift) << 23);
  return bits & 128 ? -size : size;
}

// The values of all bytes.
template <class Value>
constexpr std::array<float, 256> table_of_bytes(Value&& value) {
  std::array<float, 256> values{};
  for (size_t bits = 0; bits < 256; ++bits) values[bits] = value(static_cast<uint8_t>(bits));
  return values;
}

inline constexpr auto kE4m3 = table_of_bytes(e4m3_to_float);

// Twice a number of E2M1, which is a whole one.
constexpr int8_t e2m1_doubled(uint8_t nibble) {
  constexpr int8_t kDoubled[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  return nibble & 8 ? static_cast<int8_t>(-kDoubled[nibble & 7]) : kDoubled[nibble & 7];
}

constexpr float e8m0_to_float(uint8_t exponent) {
  if (exponent == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(exponent == 0 ? uint32_t{1} << 22 : uint32_t{exponent} << 23);
}

// Constant expressions may not compute with NaN, so these define the result.
constexpr bool is_nan(float x) { return x != x; }
constexpr float halved(float x) { return is_nan(x) ? x : x * 0.5f; }

// The bits of bf16(code scale), when that is exact or beyond all numbers.
constexpr uint16_t product_in_bf16(int code, float scale) {
  if (is_nan(scale)) return to_bf16(scale).bits;
  const double product = static_cast<double>(code) * static_cast<double>(scale);
  if (product >= 0x1p128) return 0x7f80;
  if (product <= -0x1p128) return 0xff80;
  return to_bf16(static_cast<float>(product)).bits;
}

}  // namespace ktmoe
