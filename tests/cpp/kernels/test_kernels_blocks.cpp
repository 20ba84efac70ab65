// Products by weights in blocks: those of their decoded rows in bf16, to the bit, on every instruction set.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "formats/registry.h"
#include "nn_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

// All formats of blocks.
const std::vector<FormatId> kBlockFormats = [] {
  std::vector<FormatId> formats;
  for (size_t i = 0; i < kNumFormats; ++i)
    if (format_is_blocks(static_cast<FormatId>(i))) formats.push_back(static_cast<FormatId>(i));
  return formats;
}();

// A block of any codes whose weights are zeros or of ordinary sizes: drawn until one is.
void draw_block(FormatId format, std::byte* to, Random& random) {
  const size_t values = format_block(format), bytes = format_row_bytes(format, values);
  WeightView block{to, static_cast<ptrdiff_t>(bytes), static_cast<uint32_t>(values)};
  block.format = format;
  std::vector<float> weights(values);
  const auto is_ordinary = [](float w) {
    return w == 0 || (std::abs(w) > 0x1p-30f && std::abs(w) < 0x1p10f);
  };
  do {
    for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<std::byte>(random.below(256));
    with_format(format, [&](auto f) { decltype(f)::decode(block, 0, weights.data()); });
  } while (!std::ranges::all_of(weights, is_ordinary));
}

// Rows of such blocks.
class BlockMatrix {
 public:
  BlockMatrix(FormatId format, uint32_t rows, uint32_t k, uint32_t gap, Random& random)
      : format_(format), k_(k), stride_(format_row_bytes(format, k) + gap), bytes_(rows * stride_ - gap) {
    const size_t block = format_block(format_), block_bytes = format_row_bytes(format_, block);
    for (uint32_t n = 0; n < rows; ++n) {
      std::byte* row = bytes_.data() + n * stride_;
      for (size_t at = 0; at < k; at += block, row += block_bytes) draw_block(format_, row, random);
    }
  }
  WeightView view() const {
    WeightView w{bytes_.data(), static_cast<ptrdiff_t>(stride_), k_};
    w.format = format_;
    return w;
  }
  // The same weights in bf16, by the scalar decoder.
  Matrix decoded(uint32_t rows) const {
    std::vector<float> values(size_t{rows} * k_);
    for (uint32_t n = 0; n < rows; ++n)
      with_format(format_, [&](auto f) { decltype(f)::decode(view(), n, values.data() + size_t{n} * k_); });
    return Matrix(rows, k_, Layout::kTight, [&, i = size_t{0}]() mutable { return values[i++]; });
  }

 private:
  FormatId format_;
  uint32_t k_;
  size_t stride_;
  Guarded<std::byte> bytes_;
};

// Rows of this length and others of whole blocks.
std::vector<uint32_t> lengths(FormatId format) {
  switch (format_block(format)) {
    case 256: return {256, 512, 768, 2304};
    case 128: return {128, 256, 384, 1408, 2176};
    case 64: return {64, 128, 192, 704, 2112};
    case 32: return {32, 64, 96, 256, 288, 704, 2080};
    default: return {1, 31, 32, 33, 100, 256, 257, 513, 2050};
  }
}

std::string text(const KernelTable& table, FormatId format, uint32_t m, uint32_t n, uint32_t k) {
  return std::string(isa_name(table.isa)) + ", " + std::string(format_name(format)) + ": M " +
         std::to_string(m) + ", N " + std::to_string(n) + ", K " + std::to_string(k);
}

}  // namespace

TEST_CASE("blocks: rows dot rows are those of the decoded weights") {
  for (const KernelTable* table : usable_tables()) {
    Random random(50);
    for (FormatId format : kBlockFormats) {
      for (uint32_t k : lengths(format)) {
        for (uint32_t m : {1u, 3u, 16u, 17u, 40u}) {
          const uint32_t n = 16 + random.below(49), n0 = n > 32 ? 32 : 0;
          INFO(text(*table, format, m, n, k));
          const Matrix x(m, k, Layout::kAligned, [&] { return random.wide(); });
          const BlockMatrix w(format, n, k, random.below(2) * 5, random);
          const Matrix decoded = w.decoded(n);
          WeightView in_bf16 = decoded.weights();
          in_bf16.k = k;
          const Packed packed(*table, x.activations(), m, k);
          CHECK(first_difference(product(*table, packed.operand, w.view(), n0, n),
                                 product(*table, packed.operand, in_bf16, n0, n)) == -1);
        }
      }
    }
  }
}

TEST_CASE("blocks: sums over rows are those of the decoded weights, bf16 and other blocks beside them") {
  for (const KernelTable* table : usable_tables()) {
    Random random(51);
    for (size_t i = 0; i < kBlockFormats.size(); ++i) {
      const FormatId format = kBlockFormats[i], beside = kBlockFormats[(i + 1) % kBlockFormats.size()];
      for (uint32_t m : {1u, 5u, 13u, 40u}) {
        const uint32_t n = 1 + random.below(100), k = 768, k0 = random.below(20) * kernels::kOutputBlock,
                       k1 = k0 + 1 + random.below(k - k0);
        INFO(text(*table, format, m, n, k), ", columns ", k0, " to ", k1);
        const Matrix g(m, n, Layout::kAligned, [&] { return random.wide(); });
        const BlockMatrix first(format, n, k, 0, random), second(beside, n, k, 3, random);
        const Matrix first_bf16 = first.decoded(n), second_bf16 = second.decoded(n);
        const Matrix adapter(n, k, Layout::kTight, [&] { return random.wide(); });
        const Lhs lhs_rows(*table, g.activations(), m, n);
        const Operand& lhs = lhs_rows.operand;
        const kernels::NnTerm encoded[] = {
            {lhs, 0, n, first.view()}, {lhs, 0, n, adapter.weights()}, {lhs, 0, n, second.view()}};
        const kernels::NnTerm plain[] = {{lhs, 0, n, first_bf16.weights()},
                                         {lhs, 0, n, adapter.weights()},
                                         {lhs, 0, n, second_bf16.weights()}};
        Output of_blocks(*table, m, k0, k1), of_bf16(*table, m, k0, k1);
        of_blocks.multiply(encoded);
        of_bf16.multiply(plain);
        CHECK(first_difference(of_blocks.rows(), of_bf16.rows()) == -1);
      }
    }
  }
}

TEST_CASE("a number that stands for no format is refused") {
  CHECK_THROWS_WITH_AS(format_row_bytes(FormatId::kCount, 32), doctest::Contains("format: got number"),
                       std::invalid_argument);
  CHECK_THROWS_AS(format_name(static_cast<FormatId>(255)), std::invalid_argument);
}

TEST_CASE("float16: every number is what it is defined to be") {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float value = half_to_float(static_cast<uint16_t>(bits)), sign = bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) {
      wrong += fraction ? !std::isnan(value) : value != sign * INFINITY;
    } else {
      const float size = exponent ? static_cast<float>(1024 + fraction) : static_cast<float>(fraction);
      const float expected = sign * std::ldexp(size, static_cast<int>(exponent ? exponent : 1) - 25);
      wrong += !same_bits(value, expected);
    }
  }
  CHECK(wrong == 0);
}
