// The scalar types of ml_dtypes that C++20 lacks, and their exact conversions.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ktmoe {

// bfloat16 in memory: the upper half of a float32.
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

// The same without a branch, so that loops become vectors.
constexpr bf16 to_bf16_unbranched(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bf16{static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16)};
}

// A float16 of these bits. Denormal numbers are computed as the excess of a normal number over 2^-14:
// arithmetic with denormal numbers takes a hundred cycles on some processors.
constexpr float half_to_float(uint16_t bits) {
  const uint32_t size = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  if (size >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (size & 0x3ffu) << 13);
  const float number = std::bit_cast<float>((size << 13) + ((size < 0x400 ? 113u : 112u) << 23));
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size < 0x400 ? number - 0x1p-14f : number));
}

// A float16 in memory, and its bits.
inline uint16_t half_bits_at(const std::byte* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
inline float half_at(const std::byte* p) { return half_to_float(half_bits_at(p)); }

inline bool is_finite(bf16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }

}  // namespace ktmoe
