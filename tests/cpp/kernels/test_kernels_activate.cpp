// Is the intermediate the activation of gate and up, rounded once, in every layout that a product reads?
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "activation_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

// A bf16 next to the rounded exact value is right: fp32 may lie on the other side of a tie. So is an error
// that comes from a sigmoid too small for a normal number, which counts as zero.
bool is_close(float h, double exact, double g, double u) {
  const int32_t distance = bf16_rank(to_bf16(h)) - bf16_rank(to_bf16(static_cast<float>(exact)));
  return std::abs(distance) <= 1 ||
         std::fabs(h - exact) <= 4 * (1 + std::fabs(g)) * (2 + std::fabs(u)) * 0x1p-126;
}

// ---- driving the kernels ----

// The gate and up projections of an expert with their biases, and the activation.
struct Expert {
  Activation activation;
  Matrix gate, up;
  Guarded<float> gate_bias, up_bias;

  // Weights are whole numbers / 32, so that gate and up are exact; so are the biases, in eighths.
  Expert(const Activation& a, uint32_t width, uint32_t k, Random& random)
      : activation(a),
        gate(width, k, Layout::kTight, [&] { return random.whole() / 32; }),
        up(width, k, Layout::kTight, [&] { return random.whole() / 32; }),
        gate_bias(width),
        up_bias(width) {
    for (float& b : gate_bias) b = random.whole() / 8;
    for (float& b : up_bias) b = random.whole() / 8;
  }

  // Writes outputs [n0, n1) of rows [m0, m1) as a layer does.
  void run_panel(const RowsView& x, const Intermediate& h, uint32_t m0, uint32_t m1, uint32_t n0,
                 uint32_t n1) const {
    RowsView rows = x;
    if (rows.index != nullptr)
      rows.index += m0;
    else
      rows.data += m0 * rows.stride;
    const Packed packed(h.table, rows, m1 - m0, gate.columns());
    Block g(h.table, m1 - m0, n0, n1), u(h.table, m1 - m0, n0, n1);
    g.multiply(packed.operand, gate.weights());
    u.multiply(packed.operand, up.weights());
    // Biases of the block alone, up to the end of their memory.
    const Guarded<float> g_bias(n1 - n0), u_bias(n1 - n0);
    std::copy_n(gate_bias.data() + n0, n1 - n0, g_bias.data());
    std::copy_n(up_bias.data() + n0, n1 - n0, u_bias.data());

    kernels::ActivateArgs args;
    args.activation = activation;
    args.c_gate = g.c(), args.gate_bias = g_bias.data();
    if (activation.gated) args.c_up = u.c(), args.up_bias = u_bias.data();
    args.n0 = n0, args.n1 = n1, args.h = h.rows(m0, m1);
    h.table.activate(args);
  }

  std::vector<float> intermediate(const KernelTable& table, const RowsView& x, uint32_t m, uint32_t row_block,
                                  uint32_t output_block) const {
    const uint32_t width = gate.rows();
    const Intermediate h(table, m, width);
    for (uint32_t m0 = 0; m0 < m; m0 += row_block)
      for (uint32_t n0 = 0; n0 < width; n0 += output_block)
        run_panel(x, h, m0, std::min(m, m0 + row_block), n0, std::min(width, n0 + output_block));
    return h.values();
  }

  // Exact gate and up of a row, biases added.
  double gate_of(const std::vector<float>& x, uint32_t n) const { return dot(x, gate.row(n)) + gate_bias[n]; }
  double up_of(const std::vector<float>& x, uint32_t n) const { return dot(x, up.row(n)) + up_bias[n]; }

 private:
  static double dot(const std::vector<float>& x, const std::vector<float>& w) {
    double sum = 0;
    for (size_t k = 0; k < x.size(); ++k) sum += double{x[k]} * w[k];
    return sum;
  }
};

// Every magnitude, the neighborhood of zero and of the limits, and values far outside; none that overflows,
// as an infinity would show in every column when the intermediate is read by a product.
std::vector<float> sweep(Random& random) {
  std::vector<float> values = {
      0.0f,    -0.0f, 7,     -7,    10,     -10, 0.625f, -0.625f, 2.5f, -2.5f,     1e-30f,
      -1e-30f, 1e4f,  -1e4f, 1e15f, -1e30f, 88,  -88,    103,     -103, 0x1p-126f, -0x1.fffffep127f};
  while (values.size() < 1024) values.push_back(random.unit() * 12);
  while (values.size() < 2048)
    values.push_back(std::ldexp(random.unit(), static_cast<int>(random.below(40)) - 30));
  while (values.size() < 2560) values.push_back(random.unit() * 110);
  return values;
}

}  // namespace

TEST_CASE("activate: every function over its whole range") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      Random random(30);
      const std::vector<float> gates = sweep(random);
      int wrong = 0;
      float first_g = 0, first_u = 0, first_h = 0;
      for (size_t i = 0; i < gates.size(); i += 64) {
        const std::vector<float> g(gates.begin() + i, gates.begin() + i + 64);
        std::vector<float> u;
        for (int j = 0; j < 64; ++j) u.push_back(j % 2 ? random.unit() * 12 : random.wide());
        const std::vector<float> h = activate_values(*table, named.activation, g, u);
        for (int j = 0; j < 64; ++j) {
          if (is_close(h[j], exact_activation(named.activation, g[j], u[j]), g[j], u[j])) continue;
          if (wrong++ == 0) first_g = g[j], first_u = u[j], first_h = h[j];
        }
      }
      INFO(text(*table, named), ": first at gate ", first_g, ", up ", first_u, ": ", first_h, " for ",
           exact_activation(named.activation, first_g, first_u));
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("activate: large gates and ups overflow to infinity, not to something else") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      INFO(text(*table, named));
      const double expected = exact_activation(named.activation, 1e30, 1e30);
      const float h = activate_values(*table, named.activation, {1e30f}, {1e30f})[0];
      CHECK(
          (std::isinf(static_cast<float>(expected)) ? std::isinf(h) && h > 0 : is_close(h, expected, 7, 7)));
    }
  }
}

TEST_CASE("activate: rows, outputs and biases meet as they should, in every shape and block") {
  const uint32_t widths[] = {1, 2, 15, 16, 17, 31, 33, 47, 64, 65, 97, 130};
  for (const KernelTable* table : usable_tables()) {
    Random random(31);
    for (size_t i = 0; i < 60; ++i) {
      const Named& named = activations()[i % activations().size()];
      const uint32_t m = 1 + random.below(80), width = widths[random.below(std::size(widths))],
                     k = 1 + random.below(80);
      const uint32_t row_block = 32 * (1 + random.below(3)), output_block = 16u << random.below(3);
      INFO(text(*table, named), ": M ", m, ", I ", width, ", K ", k, ", blocks ", row_block, " ",
           output_block);
      const Expert expert(named.activation, width, k, random);
      const Matrix x(m, k, Layout::kTight, [&] { return random.whole() / 4; });
      const std::vector<float> h = expert.intermediate(*table, x.activations(), m, row_block, output_block);
      int wrong = 0;
      for (uint32_t r = 0; r < m; ++r) {
        const std::vector<float> row = x.row(r);
        for (uint32_t n = 0; n < width; ++n) {
          const double g = expert.gate_of(row, n), u = expert.up_of(row, n);
          wrong += !is_close(h[r * width + n], exact_activation(named.activation, g, u), g, u);
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("activate: a row has the same bits alone and in any batch and block") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      INFO(text(*table, named));
      Random random(32);
      const uint32_t m = 70, width = 81, k = 50;
      const Expert expert(named.activation, width, k, random);
      const Matrix x(m, k, Layout::kTight, [&] { return random.wide(); });
      const std::vector<float> whole = expert.intermediate(*table, x.activations(), m, 96, 64);
      CHECK(first_difference(expert.intermediate(*table, x.activations(), m, 32, 16), whole) == -1);
      for (int32_t row : {0, 5, 33, 69}) {
        const std::vector<float> alone = expert.intermediate(*table, x.activations(&row), 1, 32, 32);
        const auto begin = whole.begin() + row * static_cast<int32_t>(width);
        CHECK(first_difference(alone, {begin, begin + width}) == -1);
      }
    }
  }
}

TEST_CASE("activate: a NaN in gate or up passes every function and every clamp") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      for (uint32_t width : {1u, 16u, 33u}) {
        for (uint32_t at : {0u, width - 1}) {
          INFO(text(*table, named), ", I ", width, ", at ", at);
          std::vector<float> g(width, 1.0f), u(width, 1.0f);
          g[at] = NAN;
          CHECK(std::isnan(activate_values(*table, named.activation, g, u)[at]));
          g[at] = 1;
          u[at] = NAN;
          if (named.activation.gated) CHECK(std::isnan(activate_values(*table, named.activation, g, u)[at]));
        }
      }
    }
  }
}

TEST_CASE("activate: a NaN row of activations poisons its own row of the intermediate and no other") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      INFO(text(*table, named));
      Random random(33);
      const uint32_t m = 37, width = 35, k = 20, bad = 18;
      const Expert expert(named.activation, width, k, random);
      uint32_t at = 0;
      const Matrix x(m, k, Layout::kTight, [&] { return at++ == bad * k + 7 ? NAN : random.whole() / 4; });
      const std::vector<float> h = expert.intermediate(*table, x.activations(), m, 32, 32);
      int wrong = 0;
      for (uint32_t i = 0; i < m * width; ++i) wrong += std::isfinite(h[i]) != (i / width != bad);
      CHECK(wrong == 0);
    }
  }
}
