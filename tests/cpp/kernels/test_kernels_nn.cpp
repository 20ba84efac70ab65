// Are products that sum over a weight's rows right, at any address of the operands, and bit-identical in
// every batch, however columns and sums are cut?
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "nn_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

// Around every step and block of the sum: pairs, tiles of 32, blocks of 256 for the widest products.
constexpr uint32_t kSums[] = {1,  2,  3,  15,  16,  17,  30,  31,  32,  33,  63,  64,
                              65, 95, 96, 127, 254, 255, 256, 257, 288, 511, 513, 800};
// Blocks of narrower products.
constexpr uint32_t kLongSums[] = {1023, 1024, 1025, 1057, 2048, 2049, 4097};
constexpr uint32_t kBatches[] = {96, 127, 128, 129, 200, 256, kernels::kMaxCallRows};

struct Shape {
  uint32_t m, n, k0, k1;
  uint32_t k;  // elements of a row of W
  Layout g_layout, w_layout;
  bool indexed;
  uint32_t gap;  // floats between rows of C
};

std::string text(Isa isa, const Shape& s) {
  return std::string(isa_name(isa)) + ": M " + std::to_string(s.m) + ", N " + std::to_string(s.n) +
         ", columns " + std::to_string(s.k0) + " to " + std::to_string(s.k1) + " of " + std::to_string(s.k) +
         ", layouts " + std::to_string(static_cast<int>(s.g_layout)) + " " +
         std::to_string(static_cast<int>(s.w_layout)) + (s.indexed ? ", indexed" : "") + ", gap " +
         std::to_string(s.gap);
}

Shape random_shape(Random& random, uint32_t m, uint32_t n, uint32_t width) {
  Shape s;
  s.m = m, s.n = n;
  s.k0 = random.below(4) * kernels::kOutputBlock, s.k1 = s.k0 + width;
  s.k = s.k1 + random.below(2) * random.below(40);
  s.g_layout = kActivationLayouts[random.below(3)];
  s.w_layout = kWeightLayouts[random.below(4)];
  s.indexed = random.below(2) != 0;
  s.gap = random.below(2) * random.below(20);
  return s;
}

struct Operands {
  Matrix g, w;
  std::vector<int32_t> index;

  template <class Next>
  Operands(const Shape& s, Random& random, Next next)
      : g(s.indexed ? s.m / 2 + 2 : s.m, s.n, s.g_layout, next), w(s.n, s.k, s.w_layout, next) {
    if (s.indexed) index = random_index(random, s.m, g.rows());
  }
  RowsView rows() const { return g.activations(index.empty() ? nullptr : index.data()); }
  uint32_t row(uint32_t m) const { return index.empty() ? m : static_cast<uint32_t>(index[m]); }
};

// Sums of T, row by row, and of the sizes of their terms.
template <class T>
struct Sums {
  std::vector<T> sum, size;
  Sums(const Shape& s, const Operands& o, const Matrix& w) {
    const auto g_rows = rows_as<T>(o.g), w_rows = rows_as<T>(w);
    const uint32_t width = s.k1 - s.k0;
    sum.resize(size_t{s.m} * width), size.resize(size_t{s.m} * width);
    for (uint32_t m = 0; m < s.m; ++m) {
      for (uint32_t n = 0; n < s.n; ++n) {
        const T lhs = g_rows[o.row(m)][n];
        for (uint32_t k = 0; k < width; ++k) {
          const T term = lhs * w_rows[n][s.k0 + k];
          sum[m * width + k] += term, size[m * width + k] += term < 0 ? -term : term;
        }
      }
    }
  }
};

// Whole numbers: every sum is exact, so one term that is lost, doubled or paired wrongly shows.
void check_exact(const KernelTable& table, const Shape& s, uint32_t seed) {
  INFO(text(table.isa, s));
  Random random(seed);
  const Operands o(s, random, [&] { return random.whole(); });
  const Lhs lhs(table, o.rows(), s.m, s.n);
  Output out(table, s.m, s.k0, s.k1, s.gap);
  out.multiply(lhs.operand, o.w.weights());
  const Sums<int32_t> first(s, o, o.w);
  CHECK(first_difference(out.rows(), {first.sum.begin(), first.sum.end()}) == -1);

  const Matrix other(s.n, s.k, s.w_layout, [&] { return random.whole(); });
  Sums<int32_t> both(s, o, other);
  for (size_t i = 0; i < both.sum.size(); ++i) both.sum[i] += first.sum[i];
  out.multiply(lhs.operand, other.weights(), true);
  CHECK(first_difference(out.rows(), {both.sum.begin(), both.sum.end()}) == -1);
  CHECK(out.gaps_are_untouched());
}

// Within what fp32 may be off: a sum of N products, in whatever order, rounds at most N + 1 times on the way
// of each term; denormal terms may count as zero.
void check_close(const KernelTable& table, const Shape& s, uint32_t seed) {
  INFO(text(table.isa, s));
  Random random(seed);
  const Operands o(s, random, [&] { return random.wide(); });
  const Lhs lhs(table, o.rows(), s.m, s.n);
  const std::vector<float> got = nn_product(table, lhs.operand, o.w.weights(), s.k0, s.k1);
  const Sums<double> exact(s, o, o.w);
  int count = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double bound = (s.n + 4) * (0x1p-24 * exact.size[i] + 0x1p-126);
    count += !(std::fabs(got[i] - exact.sum[i]) <= bound);  // a NaN counts
  }
  CHECK(count == 0);
}

}  // namespace

TEST_CASE("nn: every number of rows up to 50, and some up to the limit") {
  for (const KernelTable* table : usable_tables()) {
    Random random(20);
    for (uint32_t m = 1; m <= 50; ++m)
      check_exact(*table, random_shape(random, m, 1 + random.below(100), 1 + random.below(90)), m);
    for (uint32_t m : kBatches)
      check_exact(*table, random_shape(random, m, 1 + random.below(70), 1 + random.below(40)), m);
  }
}

TEST_CASE("nn: every number of columns up to 80, and some up to the limit") {
  for (const KernelTable* table : usable_tables()) {
    Random random(21);
    for (uint32_t width = 1; width <= 80; ++width)
      check_exact(*table, random_shape(random, 1 + random.below(20), 1 + random.below(70), width), width);
    for (uint32_t width : {95u, 112u, 127u, 129u, 192u, 255u, 256u, 257u, 600u, kernels::kMaxNnColumns})
      check_exact(*table, random_shape(random, 1 + random.below(20), 1 + random.below(70), width), width);
  }
}

TEST_CASE("nn: numbers of summed rows around every step and block, in every layout") {
  for (const KernelTable* table : usable_tables()) {
    Random random(22);
    for (uint32_t n : kSums) {
      for (Layout layout : kWeightLayouts) {
        Shape s = random_shape(random, 1 + random.below(7), n, 256 - random.below(50));
        s.w_layout = layout;
        check_exact(*table, s, n);
      }
    }
    for (uint32_t n : kLongSums) {
      check_exact(*table, random_shape(random, 1 + random.below(7), n, 64), n);
      check_exact(*table, random_shape(random, 1 + random.below(40), n, 1 + random.below(16)), n);
    }
  }
}

TEST_CASE("nn: real numbers stay within the bound of their rounding") {
  for (const KernelTable* table : usable_tables()) {
    Random random(23);
    for (uint32_t n : kSums)
      check_close(*table, random_shape(random, 1 + random.below(20), n, 1 + random.below(100)), n);
    for (uint32_t n : kLongSums) check_close(*table, random_shape(random, 3, n, 64), n);
  }
}

TEST_CASE("nn: a NaN or infinity stays in its row of G or its column of W") {
  for (const KernelTable* table : usable_tables()) {
    Random random(24);
    for (float bad : {NAN, INFINITY}) {
      for (bool in_g : {true, false}) {
        INFO(isa_name(table->isa).data(), in_g ? ", in G" : ", in W");
        const uint32_t m = 21, n = 77, k = 40, row = random.below(m), sum = random.below(n),
                       column = random.below(k);
        uint32_t at = 0;
        const Matrix g(m, n, Layout::kTight, [&] {
          const bool here = in_g && at++ == row * n + sum;
          return here ? bad : random.whole() + 0.5f;
        });
        at = 0;
        const Matrix w(n, k, Layout::kTight, [&] {
          const bool here = !in_g && at++ == sum * k + column;
          return here ? bad : random.whole() + 0.5f;
        });
        const Lhs lhs(*table, g.activations(), m, n);
        const std::vector<float> y = nn_product(*table, lhs.operand, w.weights(), 0, k);
        int wrong = 0;
        for (uint32_t i = 0; i < m * k; ++i) {
          const bool reached = in_g ? i / k == row : i % k == column;
          wrong += std::isfinite(y[i]) == reached;
        }
        CHECK(wrong == 0);
      }
    }
  }
}

// ---- laws: equal to the bit ----

TEST_CASE("nn: a row has the same bits alone, in any batch, in any cut of columns, wherever operands lie") {
  for (const KernelTable* table : usable_tables()) {
    Random random(25);
    const uint32_t rows = 40, columns = 200;
    for (uint32_t n : {33u, 288u, 1100u}) {
      const Matrix g(rows, n, Layout::kAligned, [&] { return random.wide(); });
      const Matrix w(n, columns, Layout::kAligned, [&] { return random.wide(); });
      const Lhs lhs(*table, g.activations(), rows, n);
      const std::vector<float> whole = nn_product(*table, lhs.operand, w.weights(), 0, columns);
      for (uint32_t m : {1u, 1u, 2u, 3u, 6u, 7u, 16u, 17u, 33u}) {
        const std::vector<int32_t> index = random_index(random, m, rows);
        const Matrix g_copy = g.copy(kActivationLayouts[random.below(3)]);
        const Matrix w_copy = w.copy(kWeightLayouts[random.below(4)]);
        const uint32_t k0 = random.below(6) * kernels::kOutputBlock, k1 = k0 + 1 + random.below(columns - k0);
        INFO(text(table->isa, {m, n, k0, k1, columns, {}, {}, true, 0}));
        const Lhs some(*table, g_copy.activations(index.data()), m, n);
        const std::vector<float> part = nn_product(*table, some.operand, w_copy.weights(), k0, k1);
        int wrong = 0;
        for (uint32_t i = 0; i < m; ++i)
          for (uint32_t k = k0; k < k1; ++k)
            wrong +=
                !same_bits(part[i * (k1 - k0) + k - k0], whole[static_cast<size_t>(index[i]) * columns + k]);
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("nn: a sum cut at a multiple of 32 rows, its second part accumulating, has the bits of the whole") {
  for (const KernelTable* table : usable_tables()) {
    Random random(26);
    for (uint32_t n : {50u, 300u, 1100u}) {
      for (uint32_t width : {16u, 70u, 256u}) {
        const uint32_t m = 19,
                       cut = (1 + random.below((n - 1) / kernels::kOutputBlock)) * kernels::kOutputBlock;
        INFO(text(table->isa, {m, n, 0, width, width, {}, {}, false, 0}), ", cut at ", cut);
        const Matrix g(m, n, Layout::kTight, [&] { return random.wide(); });
        const Matrix w(n, width, Layout::kTight, [&] { return random.wide(); });
        const Lhs lhs(*table, g.activations(), m, n);
        const std::vector<float> whole = nn_product(*table, lhs.operand, w.weights(), 0, width);

        RowsView second = g.activations();
        second.data += cut;
        const Lhs lhs0(*table, g.activations(), m, cut), lhs1(*table, second, m, n - cut);
        Output out(*table, m, 0, width);
        out.multiply(lhs0.operand, w.weights());
        out.multiply(lhs1.operand, {w.weights().row(cut), w.weights().row_stride_bytes}, true);
        CHECK(first_difference(out.rows(), whole) == -1);
      }
    }
  }
}

TEST_CASE("nn: a sum of terms, whole or parts of products, has the bits of one after the other") {
  for (const KernelTable* table : usable_tables()) {
    Random random(28);
    for (uint32_t m : {1u, 5u, 12u, 13u, 40u}) {
      for (uint32_t num_terms : {2u, 5u, 20u}) {
        const uint32_t width = 1 + random.below(256);
        INFO(isa_name(table->isa).data(), ": M ", m, ", ", num_terms, " terms, ", width, " columns");
        std::vector<Matrix> g, w;
        std::vector<std::unique_ptr<Lhs>> lhs;
        std::vector<kernels::NnTerm> terms;
        for (uint32_t i = 0; i < num_terms; ++i) {
          const uint32_t n = 1 + random.below(random.below(3) ? 70 : 700);
          const uint32_t n0 =
              random.below(2) * random.below(n) / kernels::kOutputBlock * kernels::kOutputBlock;
          g.emplace_back(m, n, Layout::kTight, [&] { return random.wide(); });
          w.emplace_back(n, width, kWeightLayouts[random.below(4)], [&] { return random.wide(); });
          lhs.push_back(std::make_unique<Lhs>(*table, g.back().activations(), m, n));
          const WeightView all = w.back().weights();
          terms.push_back({lhs.back()->operand, n0, n, {all.row(n0), all.row_stride_bytes}});
        }
        Output at_once(*table, m, 0, width), in_turn(*table, m, 0, width);
        at_once.multiply(terms);
        for (uint32_t i = 0; i < num_terms; ++i) in_turn.multiply({&terms[i], 1}, i > 0);
        CHECK(first_difference(at_once.rows(), in_turn.rows()) == -1);
      }
    }
  }
}

TEST_CASE("nn: rows that become an lhs operand where they lie give the same product") {
  for (const KernelTable* table : usable_tables()) {
    Random random(29);
    for (uint32_t m : {1u, 7u, 12u, 13u, 16u, 33u, 250u}) {
      for (uint32_t n : {1u, 31u, 32u, 100u, 512u}) {
        INFO(isa_name(table->isa).data(), ": M ", m, ", N ", n);
        const uint32_t width = 40;
        const size_t stride = round_up(n, kernels::kOutputBlock);
        const Matrix g(m, n, Layout::kTight, [&] { return random.wide(); });
        const Matrix w(n, width, Layout::kTight, [&] { return random.wide(); });
        const Lhs lhs(*table, g.activations(), m, n);
        Guarded<bf16> rows(m * stride);
        for (size_t i = 0; i < m; ++i)
          std::copy_n(g.activations().data + i * g.activations().stride, n, rows.data() + i * stride);
        const auto scratch = Guarded<std::byte>::on_cache_line(table->lhs_bytes(m, n));
        table->pack_lhs_in_place(rows.data(), stride, m, n, scratch.data());
        const Operand operand = table->lhs_in_place(rows.data(), stride, m, n);
        CHECK(first_difference(nn_product(*table, operand, w.weights(), 0, width),
                               nn_product(*table, lhs.operand, w.weights(), 0, width)) == -1);
      }
    }
  }
}

TEST_CASE("nn: the tile unit and its emulator give the same bits") {
  const KernelTable *amx = nullptr, *emulated = nullptr;
  for (const KernelTable* table : usable_tables()) {
    if (table->isa == Isa::kAmx) amx = table;
    if (table->isa == Isa::kAmxEmu) emulated = table;
  }
  if (amx == nullptr || emulated == nullptr) return;
  Random random(27);
  for (uint32_t i = 0; i < 20; ++i) {
    const Shape s = random_shape(random, 1 + random.below(40), 1 + random.below(600), 1 + random.below(256));
    INFO(text(amx->isa, s));
    const Operands o(s, random, [&] { return random.wide(); });
    const Lhs lhs0(*amx, o.rows(), s.m, s.n), lhs1(*emulated, o.rows(), s.m, s.n);
    CHECK(first_difference(nn_product(*amx, lhs0.operand, o.w.weights(), s.k0, s.k1),
                           nn_product(*emulated, lhs1.operand, o.w.weights(), s.k0, s.k1)) == -1);
  }
}
