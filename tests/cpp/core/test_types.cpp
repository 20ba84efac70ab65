// Does bf16 hold what it says? Against the definition of rounding, over every upper half of a float32.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "core/types.h"

using ktmoe::bf16;
using ktmoe::is_finite;
using ktmoe::to_bf16;
using ktmoe::to_bf16_unbranched;
using ktmoe::to_float;

namespace {

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

// The value of finite bf16 bits, computed from sign, exponent and fraction. The bits of infinity stand for
// the value that would follow the largest one: it is there that rounding overflows.
double value_of(uint32_t bits) {
  const int exponent = (bits >> 7) & 0xff;
  const double fraction = bits & 0x7f;
  const double size = exponent == 0 ? std::ldexp(fraction, -133) : std::ldexp(128 + fraction, exponent - 134);
  return (bits & 0x8000) ? -size : size;
}

// Nearest of the two neighbors of a finite x, ties to the even one.
uint16_t rounded(float x) {
  const uint32_t below = std::bit_cast<uint32_t>(x) >> 16;  // toward zero
  const double to_below = std::fabs(x - value_of(below)), to_above = std::fabs(value_of(below + 1) - x);
  const bool up = to_above < to_below || (to_above == to_below && (below & 1));
  return static_cast<uint16_t>(below + up);
}

// Whether to_bf16 does with these bits what its comment says.
bool converts(uint32_t bits) {
  const float x = from_bits(bits);
  const bf16 y = to_bf16(x);
  if (std::isnan(x)) return std::isnan(to_float(y)) && y.bits == ((bits >> 16) | 0x40);
  if (std::isinf(x)) return y.bits == bits >> 16;
  return y.bits == rounded(x);
}

}  // namespace

TEST_CASE("bf16: to_float gives the value of the bits, and to_bf16 gives the bits back") {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const bf16 x{static_cast<uint16_t>(bits)};
    const float value = to_float(x);
    if ((bits & 0x7fff) < 0x7f80) {
      wrong += value != value_of(bits) || std::signbit(value) != (bits >> 15) || to_bf16(value).bits != bits;
      wrong += !is_finite(x);
    } else {
      const bool infinite = (bits & 0x7fff) == 0x7f80;
      wrong += infinite ? !std::isinf(value) || to_bf16(value).bits != bits : !std::isnan(value);
      wrong += is_finite(x);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("bf16: to_bf16 rounds to nearest even around every value, ties included") {
  int wrong = 0;
  for (uint32_t high = 0; high < 65536; ++high)
    for (uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      wrong += !converts(high << 16 | low);
  CHECK(wrong == 0);
}

TEST_CASE("bf16: to_bf16 of random bits") {
  std::mt19937 random(1);
  int wrong = 0;
  for (int i = 0; i < 2000000; ++i) wrong += !converts(random());
  CHECK(wrong == 0);
}

TEST_CASE("bf16: to_bf16 without a branch gives the same") {
  std::mt19937 random(2);
  std::vector<float> from;
  for (uint32_t high = 0; high < 65536; ++high)
    for (uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      from.push_back(std::bit_cast<float>(high << 16 | low));
  for (int i = 0; i < 100003; ++i) from.push_back(std::bit_cast<float>(static_cast<uint32_t>(random())));
  std::vector<bf16> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = to_bf16_unbranched(from[i]);
  int wrong = 0;
  for (size_t i = 0; i < from.size(); ++i) wrong += to[i].bits != to_bf16(from[i]).bits;
  CHECK(wrong == 0);
}

TEST_CASE("bf16: examples that can be read") {
  CHECK(to_bf16(1.0f).bits == 0x3f80);
  CHECK(to_bf16(-0.0f).bits == 0x8000);
  CHECK(to_bf16(0x1.01p0f).bits == 0x3f80);    // half way between 1 and its successor: to the even one, down
  CHECK(to_bf16(0x1.03p0f).bits == 0x3f82);    // half way again: to the even one, up
  CHECK(to_bf16(0x1.fep127f).bits == 0x7f7f);  // the largest
  CHECK(to_bf16(0x1.fefffep127f).bits == 0x7f7f);
  CHECK(to_bf16(0x1.ffp127f).bits == 0x7f80);  // from half a unit above it on: infinity
  CHECK(to_bf16(0x1p-133f).bits == 0x0001);    // the smallest denormal
  CHECK(to_bf16(0x1p-134f).bits == 0x0000);
  CHECK(to_bf16(0x1.0002p-134f).bits == 0x0001);
  CHECK(to_bf16(from_bits(0x7f800001)).bits == 0x7fc0);  // a signaling NaN does not turn into infinity
  CHECK(to_bf16(from_bits(0xffc12345)).bits == 0xffc1);
}
