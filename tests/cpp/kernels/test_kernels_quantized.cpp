// Are products of quantized weights right in every format, and integer products the same bits everywhere?
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "formats/registry.h"
#include "kernel_helpers.h"
#include "nn_helpers.h"
#include "kernels/contract_training.h"
#include "moe/weights/quantize.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

// Rows of any valid codes of a format. Scales of rows are powers of two times three, those of groups
// powers of two: products with codes are then exact in bf16.
class Quantized {
 public:
  Quantized(FormatId format, uint32_t rows, uint32_t k, uint32_t gap, Random& random)
      : format_(format),
        k_(k),
        stride_(format_row_bytes(format, k) + gap),
        bytes_(rows * stride_ - gap),
        scales_(rows) {
    for (uint32_t n = 0; n < rows; ++n) {
      fill_row(bytes_.data() + n * stride_, random);
      scales_[n] = std::ldexp(random.below(2) ? 1.0f : 0.5f, static_cast<int>(random.below(5)) - 2);
    }
  }

  WeightView view() const {
    const float* scales = format_has_channel_scale(format_) ? scales_.data() : nullptr;
    WeightView w{bytes_.data(), static_cast<ptrdiff_t>(stride_), k_, scales};
    w.format = format_;
    return w;
  }
  // Row n by the scalar decoder, before its scale.
  std::vector<float> row(uint32_t n) const {
    std::vector<float> values(k_);
    with_format(format_, [&](auto f) { decltype(f)::decode(view(), n, values.data()); });
    return values;
  }
  float scale(uint32_t n) const { return format_has_channel_scale(format_) ? scales_[n] : 1.0f; }

 private:
  void fill_row(std::byte* row, Random& random) const {
    const auto any_code = [&] { return static_cast<int8_t>(static_cast<int>(random.below(255)) - 127); };
    if (format_ == FormatId::kInt8 || format_ == FormatId::kInt8Group32) {
      for (uint32_t i = 0; i < k_; ++i) row[i] = static_cast<std::byte>(any_code());
      for (size_t at = k_; at < format_row_bytes(format_, k_); at += sizeof(float)) {
        const float scale = std::ldexp(1.0f, static_cast<int>(random.below(5)) - 2);
        std::memcpy(row + at, &scale, sizeof scale);
      }
      return;
    }
    const size_t nibbles = nibble_bytes(k_);
    for (size_t i = 0; i < nibbles; ++i) row[i] = static_cast<std::byte>(random.below(256));
    if (k_ % 2 != 0) row[nibbles - 1] &= std::byte{15};
    for (size_t i = nibbles; i < format_row_bytes(format_, k_); ++i) {
      const int m = 1 + static_cast<int>(random.below(15));
      row[i] = static_cast<std::byte>(static_cast<int8_t>(random.below(2) ? m : -m));
    }
  }

  FormatId format_;
  uint32_t k_;
  size_t stride_;
  Guarded<std::byte> bytes_;
  Guarded<float> scales_;
};

// The operand of rows whose codes are gathered by an index.
struct Int8Operand {
  Guarded<std::byte> codes, memory;
  std::vector<int32_t> index;
  Operand operand;
  Int8Operand(const KernelTable& table, const RowsView& rows, uint32_t m, uint32_t k)
      : codes(Guarded<std::byte>::on_cache_line(kernels::Int8Rows::bytes(m, k))),
        memory(Guarded<std::byte>::on_cache_line(table.int8_operand_bytes(m, k))) {
    const kernels::Int8Rows all = kernels::Int8Rows::in(codes.data(), m, k);
    for (uint32_t i = 0; i < m; ++i) {  // row i of the operand is the last but i of the codes
      const int32_t from = rows.index ? rows.index[i] : static_cast<int32_t>(i);
      table.quantize_rows({rows.data, rows.stride, &from}, 1, k, all.from(m - 1 - i));
      index.push_back(static_cast<int32_t>(m - 1 - i));
    }
    operand = table.pack_int8(all, index.data(), m, k, memory.data());
  }
};

// What quantizing a row means, element by element.
struct TrueCodes {
  float scale = 0;
  std::vector<int32_t> codes;
  explicit TrueCodes(const std::vector<float>& x) {
    for (float v : x) scale = std::max(scale, std::fabs(v));
    scale /= 127.0f;
    for (float v : x) codes.push_back(scale == 0 ? 0 : static_cast<int32_t>(std::nearbyint(v / scale)));
  }
};

struct Shape {
  uint32_t m, n, k;
};
std::vector<Shape> shapes(Random& random) {
  std::vector<Shape> all;
  for (uint32_t k : {1u, 2u, 15u, 31u, 32u, 33u, 63u, 64u, 65u, 96u, 127u, 129u, 255u, 300u})
    all.push_back({1 + random.below(5), 1 + random.below(40), k});
  for (uint32_t m : {1u, 2u, 3u, 4u, 7u, 13u, 14u, 16u, 17u, 33u, 130u, 200u})
    all.push_back({m, 17 + random.below(40), 1 + random.below(200)});
  all.push_back({20, 33, 2113});
  all.push_back({150, 40, 4200});
  return all;
}

std::string text(const KernelTable& table, FormatId format, const Shape& s) {
  return std::string(isa_name(table.isa)) + ", " + std::string(format_name(format)) + ": M " +
         std::to_string(s.m) + ", N " + std::to_string(s.n) + ", K " + std::to_string(s.k);
}

}  // namespace

TEST_CASE("quantized: bf16 products are exact where they can be, in every format") {
  for (const KernelTable* table : usable_tables()) {
    Random random(40);
    for (FormatId format : kQuantizedFormats) {
      for (const Shape& s : shapes(random)) {
        INFO(text(*table, format, s));
        // Small whole numbers, few enough that sums with codes stay below 2^24.
        const Matrix x(s.m, s.k, Layout::kAligned, [&] { return static_cast<float>(random.below(9)) - 4; });
        const Quantized w(format, s.n, s.k, random.below(2) * 5, random);
        const Packed packed(*table, x.activations(), s.m, s.k);
        const uint32_t n0 = s.n > 32 ? 32 : 0;
        const auto y = product(*table, packed.operand, w.view(), n0, s.n);
        int wrong = 0;
        for (uint32_t n = n0; n < s.n; ++n) {
          const auto row = w.row(n);
          for (uint32_t m = 0; m < s.m; ++m) {
            const auto of_x = x.row(m);
            double sum = 0;
            for (uint32_t i = 0; i < s.k; ++i) sum += static_cast<double>(of_x[i]) * row[i];
            wrong += y[size_t{m} * (s.n - n0) + n - n0] != w.scale(n) * static_cast<float>(sum);
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("quantized: integer products are what they are defined to be, on every instruction set") {
  for (const KernelTable* table : usable_tables()) {
    Random random(41);
    for (FormatId format : kQuantizedFormats) {
      if (table->nt_int8[static_cast<size_t>(format)] == nullptr) {
        CHECK(format == FormatId::kInt8Group32);
        continue;
      }
      for (const Shape& s : shapes(random)) {
        INFO(text(*table, format, s));
        const Matrix x(s.m + 2, s.k, Layout::kApart, [&] { return random.wide(); });
        const std::vector<int32_t> index = random_index(random, s.m, s.m + 2);
        const Quantized w(format, s.n, s.k, random.below(2) * 5, random);
        const Int8Operand packed(*table, x.activations(index.data()), s.m, s.k);
        const auto y = product(*table, packed.operand, w.view(), 0, s.n);
        std::vector<TrueCodes> codes;
        for (int32_t i : index) codes.emplace_back(x.row(static_cast<uint32_t>(i)));
        int wrong = 0;
        for (uint32_t n = 0; n < s.n; ++n) {
          const auto row = w.row(n);
          for (uint32_t m = 0; m < s.m; ++m) {
            int32_t sum = 0;
            for (uint32_t i = 0; i < s.k; ++i) sum += codes[m].codes[i] * static_cast<int32_t>(row[i]);
            const float expected = w.scale(n) * (static_cast<float>(sum) * codes[m].scale);
            wrong += !same_bits(y[size_t{m} * s.n + n], expected);
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("quantized: a row of zeros gives zeros, one that is not finite NaN, and no other row changes") {
  for (const KernelTable* table : usable_tables()) {
    Random random(42);
    const uint32_t m = 5, n = 20, k = 70;
    const Quantized w(FormatId::kInt8, n, k, 0, random);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      uint32_t at = 0;
      const Matrix x(m, k, Layout::kTight, [&] {
        const uint32_t row = at / k, column = at++ % k;
        return row == 1 ? 0.0f : row == 3 && column == 40 ? bad : random.unit();
      });
      const Int8Operand packed(*table, x.activations(), m, k);
      const auto y = product(*table, packed.operand, w.view(), 0, n);
      for (uint32_t i = 0; i < m * n; ++i) {
        CHECK(std::isnan(y[i]) == (i / n == 3));
        if (i / n == 1) CHECK(y[i] == 0);
      }
    }
  }
}

TEST_CASE("quantized: products over rows take bf(code * scale), in every format") {
  for (const KernelTable* table : usable_tables()) {
    Random random(43);
    for (FormatId format : kQuantizedFormats) {
      for (uint32_t m : {1u, 5u, 13u, 40u}) {
        const uint32_t n = 1 + random.below(150), k = 300, k0 = random.below(4) * kernels::kOutputBlock,
                       k1 = k0 + 1 + random.below(k - k0);
        INFO(text(*table, format, {m, n, k}), ", columns ", k0, " to ", k1);
        const Matrix g(m, n, Layout::kAligned, [&] { return static_cast<float>(random.below(9)) - 4; });
        const Quantized w(format, n, k, 0, random);
        const Lhs lhs(*table, g.activations(), m, n);
        const auto c = nn_product(*table, lhs.operand, w.view(), k0, k1);
        std::vector<double> sums(size_t{m} * (k1 - k0));
        for (uint32_t i = 0; i < n; ++i) {
          const auto row = w.row(i);
          for (uint32_t j = 0; j < m; ++j)
            for (uint32_t column = k0; column < k1; ++column)
              sums[j * (k1 - k0) + column - k0] +=
                  static_cast<double>(g.row(j)[i]) * to_float(to_bf16(row[column] * w.scale(i)));
        }
        int wrong = 0;
        for (size_t i = 0; i < sums.size(); ++i) wrong += c[i] != static_cast<float>(sums[i]);
        CHECK(wrong == 0);
      }
    }
  }
}
