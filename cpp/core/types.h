// The scalar types that NumPy arrays of ml_dtypes hold and C++20 does not name, and their exact conversions.
#pragma once

#include <bit>
#include <cstdint>

namespace ktmoe {

// bfloat16 as it lies in memory: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};
static_assert(sizeof(bf16) == 2);

constexpr float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even. A NaN stays a NaN: its quiet bit is set and its payload cut.
constexpr bf16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline bool is_finite(bf16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }

}  // namespace ktmoe
