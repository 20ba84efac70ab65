// The kernels on one row: the same bits as the plain loop that states them, on every instruction set.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kernel_helpers.h"

namespace ktmoe {
namespace {

using namespace ktmoe::test;
using kernels::DropoutKey;
using kernels::ElementwiseKernels;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr size_t kSizes[] = {0, 1, 7, 8, 31, 32, 33, 70, 96, 257};

std::vector<bf16> rounded_values(size_t size, uint32_t seed) {
  Random random(seed);
  std::vector<bf16> values(size);
  for (bf16& value : values) value = to_bf16(random.wide());
  return values;
}

std::vector<float> float_values(size_t size, uint32_t seed) {
  Random random(seed);
  std::vector<float> values(size);
  for (float& value : values) value = random.wide();
  return values;
}

template <class Function>
void for_kernels(Function&& function) {
  for (const KernelTable* table : usable_tables()) {
    CAPTURE(isa_name(table->isa));
    function(table->elementwise);
  }
}

bool are_nan(const std::vector<bf16>& row) {
  return std::all_of(row.begin(), row.end(), [](bf16 value) { return std::isnan(to_float(value)); });
}

std::vector<bf16> scale_finite(const ElementwiseKernels& kernels, const std::vector<bf16>& x, float w) {
  std::vector<bf16> to(x.size());
  kernels.scale_finite(x.data(), w, x.size(), to.data());
  return to;
}

}  // namespace

TEST_CASE("scaled rows are products rounded to nearest even") {
  for_kernels([](const ElementwiseKernels& kernels) {
    for (size_t size : kSizes) {
      const std::vector<bf16> x = rounded_values(size, 1);
      const std::vector<float> floats = float_values(size, 2);
      std::vector<bf16> scaled(size), rounded(size), rounded_scaled(size), in_place = x;
      kernels.scale(x.data(), 0.7f, size, scaled.data());
      kernels.scale(in_place.data(), 0.7f, size, in_place.data());
      kernels.round(floats.data(), size, rounded.data());
      kernels.round_scaled(floats.data(), -1.3f, size, rounded_scaled.data());
      const std::vector<bf16> finite = scale_finite(kernels, x, 0.7f);
      size_t wrong = 0;
      for (size_t i = 0; i < size; ++i) {
        const uint16_t expected = to_bf16(0.7f * to_float(x[i])).bits;
        wrong += scaled[i].bits != expected || in_place[i].bits != expected || finite[i].bits != expected;
        wrong += rounded[i].bits != to_bf16(floats[i]).bits;
        wrong += rounded_scaled[i].bits != to_bf16(-1.3f * floats[i]).bits;
      }
      CHECK(wrong == 0);
    }
    // 1 + 2^-7 and 1 + 3 2^-7, times 1.5, lie halfway between two neighbors.
    CHECK(scale_finite(kernels, {bf16{0x3f81}}, 1.5f)[0].bits == 0x3fc2);
    CHECK(scale_finite(kernels, {bf16{0x3f83}}, 1.5f)[0].bits == 0x3fc4);
    CHECK(scale_finite(kernels, {bf16{0x3f81}}, 0.0f)[0].bits == 0);
    CHECK(scale_finite(kernels, {bf16{0x3f81}}, -0.0f)[0].bits == 0x8000);
  });
}

TEST_CASE("rounding keeps denormal numbers, infinities and NaN") {
  for_kernels([](const ElementwiseKernels& kernels) {
    const std::vector<float> x = {0x1p-133f, 0x1p-134f, 0x1.0002p-134f, kInf,
                                  -kInf,     kNaN,      0x1.ffp127f,    -0.0f};
    std::vector<bf16> to(x.size());
    kernels.round(x.data(), x.size(), to.data());
    for (size_t i = 0; i < x.size(); ++i) CHECK(to[i].bits == to_bf16(x[i]).bits);
  });
}

TEST_CASE("a widened row has the same numbers, every bit of them") {
  std::vector<bf16> x(0x10000);
  for (size_t i = 0; i < x.size(); ++i) x[i].bits = static_cast<uint16_t>(i);
  for_kernels([&](const ElementwiseKernels& kernels) {
    std::vector<float> to(x.size());
    kernels.widen(x.data(), x.size(), to.data());
    size_t wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) wrong += std::bit_cast<uint32_t>(to[i]) != i << 16;
    CHECK(wrong == 0);
    for (size_t size : kSizes) {
      std::vector<float> part(size + 1, -1.0f);
      kernels.widen(x.data() + 0x3f80, size, part.data());
      for (size_t i = 0; i < size; ++i) CHECK(part[i] == to[0x3f80 + i]);
      CHECK(part[size] == -1.0f);
    }
  });
}

TEST_CASE("a row that is not finite is all NaN") {
  for_kernels([](const ElementwiseKernels& kernels) {
    const std::vector<bf16> ones(40, to_bf16(1.0f));
    std::vector<bf16> copy(ones.size());
    kernels.copy_finite(ones.data(), ones.size(), copy.data());
    CHECK(
        std::equal(copy.begin(), copy.end(), ones.begin(), [](bf16 a, bf16 b) { return a.bits == b.bits; }));
    for (float bad : {kInf, -kInf, kNaN}) {
      std::vector<bf16> x = ones;
      x[39] = to_bf16(bad);
      kernels.copy_finite(x.data(), x.size(), copy.data());
      CHECK(are_nan(copy));
      for (float w : {1.0f, 0.0f}) CHECK(are_nan(scale_finite(kernels, x, w)));
      CHECK(are_nan(scale_finite(kernels, ones, bad)));
    }
    std::vector<bf16> large = ones;
    large[3] = bf16{0x7f7f};  // the largest
    CHECK(are_nan(scale_finite(kernels, large, 2.0f)));
    CHECK(are_nan(scale_finite(kernels, large, 1.004f)));  // a float32, but not a bf16
    for (bf16 value : scale_finite(kernels, large, 1.0f)) CHECK_FALSE(std::isnan(to_float(value)));
  });
}

TEST_CASE("sums are taken element after element") {
  for_kernels([](const ElementwiseKernels& kernels) {
    for (size_t size : kSizes) {
      const std::vector<bf16> x = rounded_values(size, 3);
      const std::vector<float> y = float_values(size, 4);
      std::vector<float> to = float_values(size, 5);
      std::vector<float> expected = to;
      float dot = 0, sum = 0;
      for (size_t i = 0; i < size; ++i) {
        const float product = to_float(x[i]) * y[i];
        dot += product, sum += y[i], expected[i] += y[i];
      }
      CHECK(kernels.dot(x.data(), y.data(), size) == dot);
      CHECK(kernels.sum(y.data(), size) == sum);
      kernels.add(y.data(), size, to.data());
      CHECK(to == expected);
    }
  });
}

TEST_CASE("dot products by blocks do not depend on where columns are cut, nor on the instruction set") {
  for (size_t size : kSizes) {
    const std::vector<bf16> x = rounded_values(size, 6);
    const std::vector<float> grad = float_values(size, 7);
    std::vector<float> first;
    for_kernels([&](const ElementwiseKernels& kernels) {
      std::vector<float> whole((size + 31) / 32), cut(whole.size());
      kernels.dot_blocks(grad.data(), x.data(), size, whole.data());
      for (size_t b = 0; b < cut.size(); ++b) {
        const size_t begin = b * 32, end = std::min(begin + 32, size);
        kernels.dot_blocks(grad.data() + begin, x.data() + begin, end - begin, &cut[b]);
        double exact = 0, magnitude = 0;
        for (size_t i = begin; i < end; ++i) {
          exact += double{grad[i]} * to_float(x[i]);
          magnitude += std::abs(double{grad[i]} * to_float(x[i]));
        }
        CHECK(std::abs(whole[b] - exact) <= 10 * 0x1p-24 * magnitude);
      }
      CHECK(cut == whole);
      if (first.empty()) first = whole;
      CHECK(whole == first);
    });
  }
}

TEST_CASE("masks are drawn as the reference states it") {
  for_kernels([](const ElementwiseKernels& kernels) {
    const DropoutKey key{1, 0, 0, 0, 0.5};  // the example of reference.dropout_mask
    uint8_t bits = 0;
    kernels.draw_mask(key, 0, 6, &bits);
    CHECK(bits == 0b111111);
    kernels.draw_mask(key, 1, 6, &bits);
    CHECK(bits == 0b110001);
  });
}

TEST_CASE("a mask is the same on every instruction set and zero behind its features") {
  const KernelTable* scalar = kernels::find_table(Isa::kScalar);
  for (uint32_t features : {1u, 4u, 5u, 8u, 9u, 77u, 131u}) {
    const DropoutKey key{0x123456789abcdef0, 3, 5, 1, 0.25};
    std::vector<uint8_t> expected(kernels::mask_row_bytes(features));
    scalar->elementwise.draw_mask(key, 11, features, expected.data());
    if (features % 8 != 0) CHECK((expected.back() >> (features % 8)) == 0);
    for_kernels([&](const ElementwiseKernels& kernels) {
      std::vector<uint8_t> bits(expected.size() + 1, 0xff);
      kernels.draw_mask(key, 11, features, bits.data());
      CHECK(std::equal(expected.begin(), expected.end(), bits.begin()));
      CHECK(bits.back() == 0xff);
    });
  }
}

TEST_CASE("a masked row has zeros where bits are not set") {
  for_kernels([](const ElementwiseKernels& kernels) {
    Random random(8);
    std::vector<uint8_t> bits(40);
    for (uint8_t& byte : bits) byte = static_cast<uint8_t>(random.bits());
    for (uint32_t first : {0u, 1u, 32u, 45u})
      for (uint32_t size : {0u, 1u, 31u, 64u, 130u}) {
        const std::vector<float> x = float_values(size, 9);
        const std::vector<bf16> half = rounded_values(size, 10);
        std::vector<float> to = x;
        std::vector<bf16> half_to(size);
        kernels.mask_float(to.data(), bits.data(), first, size, to.data());
        kernels.mask_bf16(half.data(), bits.data(), first, size, half_to.data());
        for (uint32_t i = 0; i < size; ++i) {
          const bool is_kept = (bits[(first + i) / 8] >> ((first + i) % 8) & 1) != 0;
          CHECK(to[i] == (is_kept ? x[i] : 0.0f));
          CHECK(half_to[i].bits == (is_kept ? half[i].bits : 0));
        }
      }
  });
}

}  // namespace ktmoe
