// Are gradients of weights, products that sum over tokens, right: gathered, scaled, added and transposed?
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernel_helpers.h"
#include "kernels/contract_training.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

// Around pairs, tiles of 32 and blocks of 256 and 512 tokens.
constexpr uint32_t kTokens[] = {0,  1,  2,   3,   15,  16,  17,  31,  32,  33,
                                63, 65, 255, 256, 257, 289, 511, 512, 513, 1000};

// Where D[n, k] lies.
enum class Order {
  kRows,     // k_stride 1
  kColumns,  // n_stride 1: the transpose
  kApart,    // neither
};

struct Shape {
  uint32_t m, n, k;
  Layout g_layout, x_layout;
  bool g_indexed, x_indexed;
  Order order;
  uint32_t gap;
  float scale;  // a power of two
};

std::string text(Isa isa, const Shape& s) {
  return std::string(isa_name(isa)) + ": M " + std::to_string(s.m) + ", N " + std::to_string(s.n) + ", K " +
         std::to_string(s.k) + ", layouts " + std::to_string(static_cast<int>(s.g_layout)) + " " +
         std::to_string(static_cast<int>(s.x_layout)) + (s.g_indexed ? ", G indexed" : "") +
         (s.x_indexed ? ", X indexed" : "") + ", order " + std::to_string(static_cast<int>(s.order)) +
         ", gap " + std::to_string(s.gap) + ", scale " + std::to_string(s.scale);
}

Shape random_shape(Random& random, uint32_t m, uint32_t n, uint32_t k) {
  Shape s;
  s.m = m, s.n = n, s.k = k;
  s.g_layout = kActivationLayouts[random.below(3)];
  s.x_layout = kActivationLayouts[random.below(3)];
  s.g_indexed = random.below(2) != 0, s.x_indexed = random.below(2) != 0;
  s.order = static_cast<Order>(random.below(3));
  s.gap = random.below(2) * random.below(20);
  s.scale = random.below(2) ? 1.0f : -0.25f;
  return s;
}

// Rows of bf16, at least one, and which of them are taken.
struct Rows {
  Matrix matrix;
  std::vector<int32_t> index;

  template <class Next>
  Rows(uint32_t m, uint32_t columns, Layout layout, bool indexed, Random& random, Next next)
      : matrix(indexed ? m / 2 + 2 : std::max(m, 1u), columns, layout, next) {
    if (indexed) index = random_index(random, m, matrix.rows());
  }
  RowsView view() const { return matrix.activations(index.empty() ? nullptr : index.data()); }
  uint32_t row(uint32_t m) const { return index.empty() ? m : static_cast<uint32_t>(index[m]); }
};

struct Operands {
  Rows g, x;
  template <class Next>
  Operands(const Shape& s, Random& random, Next next)
      : g(s.m, s.n, s.g_layout, s.g_indexed, random, next),
        x(s.m, s.k, s.x_layout, s.x_indexed, random, next) {}
};

// D, wherever its elements lie.
class Output {
 public:
  explicit Output(const Shape& s)
      : n_(s.n), k_(s.k), n_stride_(n_stride(s)), k_stride_(k_stride(s)), d_(at(s.n - 1, s.k - 1) + 1) {}

  void multiply(const KernelTable& table, uint32_t m, const RowsView& g, const RowsView& x, float scale,
                bool accumulate = false) {
    const auto scratch = Guarded<std::byte>::on_cache_line(table.tn_scratch_bytes());
    kernels::TnArgs args;
    args.g = g, args.x = x, args.m = m, args.n = n_, args.k = k_, args.scale = scale;
    args.d = d_.data(), args.n_stride = n_stride_, args.k_stride = k_stride_;
    args.accumulate = accumulate, args.scratch = scratch.data();
    table.tn(args);
  }

  // [n][k], row-major.
  std::vector<float> rows() const {
    std::vector<float> rows;
    for (uint32_t n = 0; n < n_; ++n)
      for (uint32_t k = 0; k < k_; ++k) rows.push_back(d_[at(n, k)]);
    return rows;
  }
  // Nothing but D is written: what lies between its elements is NaN.
  bool gaps_are_untouched() const {
    size_t written = 0;
    for (float x : d_) written += !std::isnan(x);
    return written == size_t{n_} * k_;
  }

 private:
  static size_t n_stride(const Shape& s) {
    return s.order == Order::kRows ? s.k + s.gap : s.order == Order::kColumns ? 1 : 3 * size_t{s.k} + s.gap;
  }
  static size_t k_stride(const Shape& s) {
    return s.order == Order::kRows ? 1 : s.order == Order::kColumns ? s.n + s.gap : 3;
  }
  size_t at(uint32_t n, uint32_t k) const { return n * n_stride_ + k * k_stride_; }

  uint32_t n_, k_;
  size_t n_stride_, k_stride_;
  Guarded<float> d_;
};

std::vector<float> tn_product(const KernelTable& table, const Shape& s, const Operands& o) {
  Output out(s);
  out.multiply(table, s.m, o.g.view(), o.x.view(), s.scale);
  return out.rows();
}

// Sums in double, which are exact for whole numbers, and of the sizes of their terms.
struct Sums {
  std::vector<double> sum, size;
  Sums(const Shape& s, const Operands& o) : sum(size_t{s.n} * s.k), size(size_t{s.n} * s.k) {
    const auto g_rows = rows_as<double>(o.g.matrix), x_rows = rows_as<double>(o.x.matrix);
    for (uint32_t m = 0; m < s.m; ++m) {
      const std::vector<double>&g = g_rows[o.g.row(m)], &x = x_rows[o.x.row(m)];
      for (uint32_t n = 0; n < s.n; ++n) {
        for (uint32_t k = 0; k < s.k; ++k) {
          const double term = s.scale * g[n] * x[k];
          sum[n * s.k + k] += term, size[n * s.k + k] += std::fabs(term);
        }
      }
    }
  }
};

// Written, then added to.
void check_exact(const KernelTable& table, const Shape& s, uint32_t seed) {
  INFO(text(table.isa, s));
  Random random(seed);
  const Operands first(s, random, [&] { return random.whole(); });
  const Operands second(s, random, [&] { return random.whole(); });
  Output out(s);
  out.multiply(table, s.m, first.g.view(), first.x.view(), s.scale);
  const Sums sums(s, first);
  std::vector<float> expected(sums.sum.begin(), sums.sum.end()), got = out.rows();
  CHECK(got == expected);

  out.multiply(table, s.m, second.g.view(), second.x.view(), s.scale, true);
  const Sums more(s, second);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += static_cast<float>(more.sum[i]);
  CHECK(out.rows() == expected);
  CHECK(out.gaps_are_untouched());
}

// The sum rounds as in any product, the scale once more.
void check_close(const KernelTable& table, Shape s, uint32_t seed) {
  s.scale = 0.7f;
  INFO(text(table.isa, s));
  Random random(seed);
  const Operands o(s, random, [&] { return random.wide(); });
  const std::vector<float> got = tn_product(table, s, o);
  const Sums exact(s, o);
  int count = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double bound = (s.m + 5) * (0x1p-24 * exact.size[i] + 0x1p-126);
    count += !(std::fabs(got[i] - exact.sum[i]) <= bound);  // a NaN counts
  }
  CHECK(count == 0);
}

}  // namespace

TEST_CASE("tn: numbers of tokens around every step and block, none included, in every order") {
  for (const KernelTable* table : usable_tables()) {
    Random random(30);
    for (uint32_t m : kTokens) {
      for (Order order : {Order::kRows, Order::kColumns, Order::kApart}) {
        Shape s = random_shape(random, m, 1 + random.below(20), 1 + random.below(60));
        s.order = order;
        check_exact(*table, s, m);
      }
    }
    check_exact(*table, random_shape(random, 513, kernels::kMaxTnRows, kernels::kMaxTnColumns), 1);
  }
}

TEST_CASE("tn: every number of rows of D") {
  for (const KernelTable* table : usable_tables()) {
    Random random(31);
    for (uint32_t n = 1; n <= kernels::kMaxTnRows; ++n)
      check_exact(*table, random_shape(random, 1 + random.below(70), n, 1 + random.below(50)), n);
  }
}

TEST_CASE("tn: every number of columns of D up to 80, and some up to the limit") {
  for (const KernelTable* table : usable_tables()) {
    Random random(32);
    for (uint32_t k = 1; k <= 80; ++k)
      check_exact(*table, random_shape(random, 1 + random.below(70), 1 + random.below(20), k), k);
    for (uint32_t k : {112u, 127u, 129u, 192u, 240u, 255u, kernels::kMaxTnColumns})
      check_exact(*table, random_shape(random, 1 + random.below(70), 1 + random.below(40), k), k);
  }
}

TEST_CASE("tn: real numbers stay within the bound of their rounding") {
  for (const KernelTable* table : usable_tables()) {
    Random random(33);
    for (uint32_t m : kTokens)
      check_close(*table, random_shape(random, m, 1 + random.below(20), 1 + random.below(100)), m);
  }
}

TEST_CASE("tn: without tokens D is zero, and what is added to stays") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(34);
    Shape s = random_shape(random, 0, 20, 40);
    const Operands none(s, random, [&] { return NAN; });
    for (float x : tn_product(*table, s, none)) CHECK(same_bits(x, s.scale < 0 ? -0.0f : 0.0f));

    s.m = 9, s.g_indexed = s.x_indexed = false;
    const Operands some(s, random, [&] { return random.wide(); });
    Output out(s);
    out.multiply(*table, s.m, some.g.view(), some.x.view(), 1.0f);
    const std::vector<float> before = out.rows();
    out.multiply(*table, 0, none.g.view(), none.x.view(), 1.0f, true);
    CHECK(first_difference(out.rows(), before) == -1);
  }
}

TEST_CASE("tn: an element has the same bits in any block of D, in any order, from rows gathered or copied") {
  for (const KernelTable* table : usable_tables()) {
    Random random(35);
    for (uint32_t m : {5u, 100u, 600u}) {
      Shape s = random_shape(random, m, 40, 150);
      s.order = Order::kRows, s.scale = 0.3f, s.g_indexed = s.x_indexed = true;
      const Operands o(s, random, [&] { return random.wide(); });
      const std::vector<float> whole = tn_product(*table, s, o);
      for (int i = 0; i < 6; ++i) {
        const uint32_t n0 = random.below(s.n), k0 = random.below(s.k);
        Shape part = random_shape(random, m, 1 + random.below(s.n - n0), 1 + random.below(s.k - k0));
        part.scale = s.scale;
        INFO(text(table->isa, part), ", from ", n0, " ", k0);
        const Matrix x_copy = o.x.matrix.copy(part.x_layout);
        RowsView g = o.g.view(), x = x_copy.activations(o.x.index.data());
        g.data += n0, x.data += k0;
        Output out(part);
        out.multiply(*table, m, g, x, part.scale);
        const std::vector<float> got = out.rows();
        int wrong = 0;
        for (uint32_t n = 0; n < part.n; ++n)
          for (uint32_t k = 0; k < part.k; ++k)
            wrong += !same_bits(got[n * part.k + k], whole[(n0 + n) * s.k + k0 + k]);
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("tn: the tile unit and its emulator give the same bits") {
  const KernelTable *amx = nullptr, *emulated = nullptr;
  for (const KernelTable* table : usable_tables()) {
    if (table->isa == Isa::kAmx) amx = table;
    if (table->isa == Isa::kAmxEmu) emulated = table;
  }
  if (amx == nullptr || emulated == nullptr) return;
  Random random(36);
  for (uint32_t i = 0; i < 20; ++i) {
    const Shape s = random_shape(random, random.below(700), 1 + random.below(64), 1 + random.below(256));
    INFO(text(amx->isa, s));
    const Operands o(s, random, [&] { return random.wide(); });
    CHECK(first_difference(tn_product(*amx, s, o), tn_product(*emulated, s, o)) == -1);
  }
}
