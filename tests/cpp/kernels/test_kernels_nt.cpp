// Are products right, at any address of the operands, and bit-identical in every batch?
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kernel_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

// Around every width that a kernel steps by or blocks at: segments of 8, 16, 32, blocks of 512 and 2048.
constexpr uint32_t kInputs[] = {1,   2,   7,   8,    9,    15,   16,   17,   31,   32,
                                33,  47,  48,  63,   64,   65,   96,   97,   255,  511,
                                512, 513, 704, 1055, 2047, 2048, 2049, 4097, 4160, 6145};
constexpr uint32_t kBatches[] = {71, 96, 127, 128, 129, 144, 200, 255, 256, 300, kernels::kMaxCallRows};

struct Shape {
  uint32_t m, n0, n1, k;
  Layout x_layout, w_layout;
  bool indexed;
};

std::string text(Isa isa, const Shape& s) {
  return std::string(isa_name(isa)) + ": M " + std::to_string(s.m) + ", outputs " + std::to_string(s.n0) +
         " to " + std::to_string(s.n1) + ", K " + std::to_string(s.k) + ", layouts " +
         std::to_string(static_cast<int>(s.x_layout)) + " " + std::to_string(static_cast<int>(s.w_layout)) +
         (s.indexed ? ", indexed" : "");
}

Shape random_shape(Random& random, uint32_t m, uint32_t k) {
  Shape s;
  s.m = m, s.k = k;
  s.n0 = random.below(4) * 16;
  s.n1 = s.n0 + 1 + random.below(kernels::kMaxCallOutputs);
  s.x_layout = kActivationLayouts[random.below(3)];
  s.w_layout = kWeightLayouts[random.below(4)];
  s.indexed = random.below(2) != 0;
  return s;
}

struct Operands {
  Matrix x, w;
  std::vector<int32_t> index;

  template <class Next>
  Operands(const Shape& s, Random& random, Next next)
      : x(s.indexed ? s.m / 2 + 2 : s.m, s.k, s.x_layout, next), w(s.n1, s.k, s.w_layout, next) {
    if (s.indexed) index = random_index(random, s.m, x.rows());
  }
  RowsView rows() const { return x.activations(index.empty() ? nullptr : index.data()); }
  uint32_t row(uint32_t m) const { return index.empty() ? m : static_cast<uint32_t>(index[m]); }
};

// The product of whole numbers, which is exact.
std::vector<float> exact_product(const Shape& s, const Operands& o, const Matrix& w) {
  const auto x_rows = rows_as<int32_t>(o.x), w_rows = rows_as<int32_t>(w);
  std::vector<float> y;
  for (uint32_t m = 0; m < s.m; ++m) {
    const std::vector<int32_t>& x = x_rows[o.row(m)];
    for (uint32_t n = s.n0; n < s.n1; ++n) {
      int32_t sum = 0;
      for (uint32_t k = 0; k < s.k; ++k) sum += x[k] * w_rows[n][k];
      y.push_back(static_cast<float>(sum));
    }
  }
  return y;
}

// Whole numbers: every sum is exact, so one term that is lost, doubled or paired wrongly shows.
void check_exact(const KernelTable& table, const Shape& s, uint32_t seed) {
  INFO(text(table.isa, s));
  Random random(seed);
  const Operands o(s, random, [&] { return random.whole(); });
  const Packed packed(table, o.rows(), s.m, s.k);
  Block block(table, s.m, s.n0, s.n1);
  block.multiply(packed.operand, o.w.weights());
  const std::vector<float> first = exact_product(s, o, o.w);
  CHECK(first_difference(block.rows(), first) == -1);

  const Matrix other(s.n1, s.k, s.w_layout, [&] { return random.whole(); });
  std::vector<float> sum = exact_product(s, o, other);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += first[i];
  block.multiply(packed.operand, other.weights(), true);
  CHECK(first_difference(block.rows(), sum) == -1);
}

// How many outputs are further from the double-precision sum than fp32 may be. A sum of K products, in
// whatever order, rounds at most K + 1 times on the way of each term; denormal terms may count as zero.
int beyond_bound(const Shape& s, const Operands& o, const std::vector<float>& got) {
  const auto x_rows = rows_as<double>(o.x), w_rows = rows_as<double>(o.w);
  int count = 0;
  for (uint32_t m = 0; m < s.m; ++m) {
    const std::vector<double>& x = x_rows[o.row(m)];
    for (uint32_t n = s.n0; n < s.n1; ++n) {
      double sum = 0, size = 0;
      for (uint32_t k = 0; k < s.k; ++k) {
        const double term = x[k] * w_rows[n][k];
        sum += term, size += std::fabs(term);
      }
      const double off = std::fabs(got[size_t{m} * (s.n1 - s.n0) + n - s.n0] - sum);
      count += !(off <= (s.k + 4) * (0x1p-24 * size + 0x1p-126));  // a NaN counts
    }
  }
  return count;
}

void check_close(const KernelTable& table, const Shape& s, uint32_t seed) {
  INFO(text(table.isa, s));
  Random random(seed);
  const Operands o(s, random, [&] { return random.wide(); });
  const Packed packed(table, o.rows(), s.m, s.k);
  CHECK(beyond_bound(s, o, product(table, packed.operand, o.w.weights(), s.n0, s.n1)) == 0);
}

}  // namespace

TEST_CASE("nt: every number of rows up to 70, and some up to the limit") {
  for (const KernelTable* table : usable_tables()) {
    Random random(10);
    for (uint32_t m = 1; m <= 70; ++m)
      check_exact(*table, random_shape(random, m, 32 + random.below(100)), m);
    for (uint32_t m : kBatches) check_exact(*table, random_shape(random, m, 32 + random.below(100)), m);
  }
}

TEST_CASE("nt: every number of outputs") {
  for (const KernelTable* table : usable_tables()) {
    Random random(11);
    for (uint32_t n = 1; n <= kernels::kMaxCallOutputs; ++n) {
      Shape s = random_shape(random, 1 + random.below(40), 32 + random.below(100));
      s.n1 = s.n0 + n;
      check_exact(*table, s, n);
    }
  }
}

TEST_CASE("nt: row lengths around every step and block, in every layout") {
  for (const KernelTable* table : usable_tables()) {
    Random random(12);
    for (uint32_t k : kInputs) {
      for (Layout layout : kWeightLayouts) {
        Shape s = random_shape(random, 1 + random.below(40), k);
        s.w_layout = layout;
        check_exact(*table, s, k);
      }
    }
    for (uint32_t k : {64u, 513u, 2081u})
      check_exact(*table, random_shape(random, 160 + random.below(97), k), k);
  }
}

TEST_CASE("nt: real numbers stay within the bound of their rounding") {
  for (const KernelTable* table : usable_tables()) {
    Random random(13);
    for (uint32_t k : kInputs) check_close(*table, random_shape(random, 1 + random.below(40), k), k);
    for (uint32_t m : kBatches) check_close(*table, random_shape(random, m, 1 + random.below(200)), m);
  }
}

TEST_CASE("nt: a NaN or infinity in a row of activations stays in its row") {
  for (const KernelTable* table : usable_tables()) {
    Random random(14);
    for (uint32_t m : {3u, 16u, 35u}) {
      for (float bad : {NAN, INFINITY}) {
        INFO(isa_name(table->isa).data());
        const uint32_t k = 77, n = 40, row = random.below(m), column = random.below(k);
        const Matrix w(n, k, Layout::kTight, [&] { return random.whole() + 0.5f; });
        uint32_t at = 0;
        const Matrix x(m, k, Layout::kTight, [&] { return at++ == row * k + column ? bad : random.whole(); });
        const Packed packed(*table, x.activations(), m, k);
        const std::vector<float> y = product(*table, packed.operand, w.weights(), 0, n);
        int wrong = 0;
        for (uint32_t i = 0; i < m * n; ++i) wrong += std::isfinite(y[i]) != (i / n != row);
        CHECK(wrong == 0);
      }
    }
  }
}

// ---- laws: equal to the bit ----

namespace {

// A batch and its product, taken in one go per block of outputs, and the same operands as they may lie
// elsewhere.
struct Whole {
  static constexpr uint32_t kRows = 150,
                            kOutputs = 99;  // beyond every number of rows at which a kernel changes its way
  const KernelTable& table;
  uint32_t k;
  std::vector<Matrix> x, w;              // a copy a layout
  std::vector<std::vector<float>> rows;  // [M][N]

  Whole(const KernelTable& t, uint32_t k_, Random& random)
      : table(t), k(k_), rows(kRows, std::vector<float>(kOutputs)) {
    x.emplace_back(kRows, k, Layout::kAligned, [&] { return random.wide(); });
    w.emplace_back(kOutputs, k, Layout::kAligned, [&] { return random.wide(); });
    for (Layout layout : {Layout::kTight, Layout::kApart}) x.push_back(x[0].copy(layout));
    for (Layout layout : {Layout::kTight, Layout::kApart, Layout::kOdd}) w.push_back(w[0].copy(layout));
    const Packed packed(table, x[0].activations(), kRows, k);
    for (uint32_t n0 = 0; n0 < kOutputs; n0 += kernels::kMaxCallOutputs) {
      const uint32_t n1 = std::min(kOutputs, n0 + kernels::kMaxCallOutputs);
      const std::vector<float> block = product(table, packed.operand, w[0].weights(), n0, n1);
      for (uint32_t m = 0; m < kRows; ++m)
        std::copy_n(block.begin() + m * (n1 - n0), n1 - n0, rows[m].begin() + n0);
    }
  }

  // Whether the product of some rows and outputs [n0, n1) has the bits that it has in the whole.
  bool contains(const Matrix& x_copy, const Matrix& w_copy, const std::vector<int32_t>& index, uint32_t n0,
                uint32_t n1) const {
    const uint32_t m = static_cast<uint32_t>(index.size());
    const Packed packed(table, x_copy.activations(index.data()), m, k);
    const std::vector<float> part = product(table, packed.operand, w_copy.weights(), n0, n1);
    for (uint32_t i = 0; i < m; ++i)
      for (uint32_t j = n0; j < n1; ++j)
        if (!same_bits(part[i * (n1 - n0) + j - n0], rows[static_cast<size_t>(index[i])][j])) return false;
    return true;
  }
};

}  // namespace

TEST_CASE("nt: a row has the same bits alone, in any batch, in any block, wherever its operands lie") {
  for (const KernelTable* table : usable_tables()) {
    Random random(15);
    for (uint32_t k : {33u, 704u, 2081u}) {
      const Whole whole(*table, k, random);
      for (uint32_t m : {1u, 1u, 2u, 3u, 4u, 5u, 13u, 14u, 15u, 16u, 17u, 33u, 64u, 128u, 129u}) {
        const std::vector<int32_t> index = random_index(random, m, Whole::kRows);
        const uint32_t widths[] = {1, 16, 32, 48, 64}, n0 = random.below(7) * 16;
        const uint32_t n1 = std::min(Whole::kOutputs, n0 + widths[random.below(5)]);
        INFO(text(table->isa, {m, n0, n1, k, {}, {}, true}));
        CHECK(whole.contains(whole.x[random.below(3)], whole.w[random.below(4)], index, n0, n1));
      }
    }
  }
}

TEST_CASE("nt: adding to a block gives a row the same bits alone and in a batch") {
  for (const KernelTable* table : usable_tables()) {
    Random random(16);
    // The last is enough rows for tiles to take the outputs block of K by block of K.
    struct Shape {
      uint32_t m, k;
    };
    for (const Shape shape : {Shape{40, 50}, {40, 704}, {40, 2100}, {150, 2100}}) {
      const uint32_t m = shape.m, k = shape.k;
      INFO(isa_name(table->isa).data(), ", K ", k, ", rows ", m);
      const uint32_t n = 48;
      const Matrix x(m, k, Layout::kTight, [&] { return random.wide(); });
      const Matrix w(n, k, Layout::kTight, [&] { return random.wide(); });
      const Matrix v(n, k, Layout::kApart, [&] { return random.wide(); });
      const Packed packed(*table, x.activations(), m, k);
      Block batch(*table, m, 0, n);
      batch.multiply(packed.operand, w.weights());
      batch.multiply(packed.operand, v.weights(), true);
      const std::vector<float> rows = batch.rows();
      for (int32_t row : {0, 7, 17, 39}) {
        const Packed one(*table, x.activations(&row), 1, k);
        Block alone(*table, 1, 16, n);
        alone.multiply(one.operand, w.weights());
        alone.multiply(one.operand, v.weights(), true);
        const auto begin = rows.begin() + row * static_cast<int32_t>(n);
        CHECK(first_difference(alone.rows(), {begin + 16, begin + n}) == -1);
      }
    }
  }
}

TEST_CASE("nt: where C is rows, a product may be written to where it is wanted, and nowhere beside") {
  for (const KernelTable* table : usable_tables()) {
    if (!table->c_is_rows) continue;
    Random random(18);
    for (uint32_t m : {1u, 3u, 20u}) {
      for (uint32_t n1 : {17u, 33u, 64u}) {
        const uint32_t n0 = 16, n = n1 - n0, k = 2100, stride = n + random.below(9);
        INFO(text(table->isa, {m, n0, n1, k, {}, {}, false}));
        const Matrix x(m, k, Layout::kTight, [&] { return random.wide(); });
        const Matrix w(n1, k, Layout::kTight, [&] { return random.wide(); });
        const Packed packed(*table, x.activations(), m, k);
        const std::vector<float> expected = product(*table, packed.operand, w.weights(), n0, n1);

        const Guarded<float> y((m - 1) * stride + n);
        const auto scratch = Guarded<std::byte>::on_cache_line(table->nt_scratch_bytes(k));
        kernels::NtArgs args;
        args.x = packed.operand, args.w = w.weights(), args.n0 = n0, args.n1 = n1;
        args.c = y.data(), args.c_stride = stride, args.scratch = scratch.data();
        table->nt[static_cast<size_t>(FormatId::kBf16)](args);
        int wrong = 0;
        for (uint32_t i = 0; i < y.size(); ++i) {
          const uint32_t row = i / stride, column = i % stride;
          wrong += column < n ? !same_bits(y[i], expected[row * n + column]) : !std::isnan(y[i]);
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("store_rows: bias and stride, nothing written beside the block") {
  for (const KernelTable* table : usable_tables()) {
    Random random(17);
    for (uint32_t m : {1u, 5u, 16u, 33u}) {
      for (uint32_t n : {1u, 15u, 16u, 17u, 48u, 63u}) {
        INFO(text(table->isa, {m, 0, n, 40, {}, {}, false}));
        const Matrix x(m, 40, Layout::kTight, [&] { return random.whole(); });
        const Matrix w(n, 40, Layout::kTight, [&] { return random.whole(); });
        const Packed packed(*table, x.activations(), m, 40);
        Block block(*table, m, 0, n);
        block.multiply(packed.operand, w.weights());
        const std::vector<float> plain = block.rows();

        const Guarded<float> bias(n);
        for (float& b : bias) b = random.wide();
        const uint32_t stride = n + 3;
        const Guarded<float> y((m - 1) * stride + n);
        kernels::StoreRowsArgs args;
        args.c = block.c(), args.bias = bias.data(), args.m = m, args.n = n, args.y = y.data(),
        args.y_stride = stride;
        table->store_rows(args);
        int wrong = 0;
        for (uint32_t i = 0; i < y.size(); ++i) {
          const uint32_t row = i / stride, column = i % stride;
          wrong += column < n ? y[i] != plain[row * n + column] + bias[column] : !std::isnan(y[i]);
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("limits: the kernels that measure them count what they do") {
  const auto memory = Guarded<std::byte>::on_cache_line(64 << 10);
  std::memset(memory.data(), 1, memory.size());
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    CHECK(table->limits.read(memory.data(), memory.size()) == memory.size());
    for (const auto& product : {table->limits.bf16, table->limits.int8}) {
      CHECK(product.dot(2) == 2 * product.dot(1));
      CHECK(product.dot(1) > 0);
      CHECK(product.step(2, memory.data()) == 2 * product.step(1, memory.data()));
      CHECK(product.step(1, memory.data()) > 0);
    }
  }
}
