// What the tests of the activation functions share: the functions with their formulas, and the intermediate.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "kernel_helpers.h"

namespace ktmoe::test {

using kernels::Activation;
using kernels::ActivationKind;
using kernels::default_activation;

struct Named {
  const char* name;
  Activation activation;
};

// Those that have formulas below; all are compared with the reference in Python.
inline const std::vector<Named>& activations() {
  using Kind = ActivationKind;
  static const std::vector<Named> all = {
      {"silu", {.kind = Kind::kSilu}},
      {"silu, limit 10", {.kind = Kind::kSilu, .limit = 10}},
      {"swigluoai", default_activation(Kind::kSwigluOai)},
      {"swiglustep", default_activation(Kind::kSwigluStep)},
      {"gelu", default_activation(Kind::kGelu)},
      {"gelu_tanh", default_activation(Kind::kGeluTanh)},
      {"situ", default_activation(Kind::kSitu)},
      {"silu, not gated", {.kind = Kind::kSilu, .gated = false}},
      {"gelu_tanh, not gated", {.kind = Kind::kGeluTanh, .gated = false}},
      {"relu2", {.kind = Kind::kRelu2, .gated = false}},
  };
  return all;
}

// ---- the formulas, in double ----

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double silu(double x) { return x * sigmoid(x); }
inline double gelu(double x) { return x * std::erfc(-x * std::sqrt(0.5)) / 2; }
// (1 + tanh y) / 2 = sigmoid(2 y), which does not cancel
inline double gelu_tanh(double x) {
  return x * sigmoid(2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
}

inline double exact_activation(const Activation& a, double g, double u) {
  const double limit = a.limit, g_below = std::min(g, limit), u_within = std::min(std::max(u, -limit), limit);
  if (!a.gated) u = 1;
  switch (a.kind) {
    case ActivationKind::kSilu: return a.gated ? silu(g_below) * u_within : silu(g);
    case ActivationKind::kSwigluOai: return g_below * sigmoid(a.alpha * g_below) * (u_within + 1);
    case ActivationKind::kSwigluStep: return std::min(silu(g), limit) * u_within;
    case ActivationKind::kGelu: return gelu(g) * u;
    case ActivationKind::kGeluTanh: return gelu_tanh(g) * u;
    case ActivationKind::kSitu:
      return a.beta1 * std::tanh(g / a.beta1) * sigmoid(g) * a.beta2 * std::tanh(u / a.beta2);
    case ActivationKind::kRelu2: return std::max(g, 0.0) * std::max(g, 0.0);
    default: return NAN;
  }
}

// An intermediate [M, I] in the layout of a table, NaN before anything is written.
struct Intermediate {
  const KernelTable& table;
  uint32_t m, width;
  Guarded<std::byte> memory;

  Intermediate(const KernelTable& t, uint32_t m_, uint32_t width_)
      : table(t),
        m(m_),
        width(width_),
        memory(Guarded<std::byte>::on_cache_line(t.operand_bytes(m_, width_))) {}

  Operand rows(uint32_t m0, uint32_t m1) const {
    return table.operand_block(memory.data(), m, width, m0, m1);
  }

  // Row-major values: the product with the identity, which is exact.
  std::vector<float> values() const {
    uint32_t at = 0;
    const Matrix one(width, width, Layout::kAligned, [&] {
      const bool diagonal = at / width == at % width;
      return ++at, diagonal ? 1.0f : 0.0f;
    });
    std::vector<float> all(size_t{m} * width);
    for (uint32_t m0 = 0; m0 < m; m0 += kernels::kMaxCallRows) {
      const uint32_t m1 = std::min(m, m0 + kernels::kMaxCallRows);
      for (uint32_t n0 = 0; n0 < width; n0 += kernels::kMaxCallOutputs) {
        const uint32_t n1 = std::min(width, n0 + kernels::kMaxCallOutputs);
        const std::vector<float> part = product(table, rows(m0, m1), one.weights(), n0, n1);
        for (uint32_t i = m0; i < m1; ++i)
          std::copy_n(part.begin() + (i - m0) * (n1 - n0), n1 - n0, all.begin() + i * width + n0);
      }
    }
    return all;
  }
};

// The activation of values given as biases on a C of zeros, `gates.size()` at a time.
inline std::vector<float> activate_values(const KernelTable& table, const Activation& a,
                                          const std::vector<float>& gates, const std::vector<float>& ups) {
  const uint32_t n = static_cast<uint32_t>(gates.size());
  const Intermediate h(table, 1, n);
  const auto zeros = Guarded<float>::on_cache_line(table.c_floats(1, n));
  for (float& c : zeros) c = 0;
  const Guarded<float> g(n), u(n);
  std::copy(gates.begin(), gates.end(), g.begin());
  std::copy(ups.begin(), ups.end(), u.begin());
  kernels::ActivateArgs args;
  args.activation = a;
  args.c_gate = zeros.data(), args.gate_bias = g.data();
  if (a.gated) args.c_up = zeros.data(), args.up_bias = u.data();
  args.n1 = n, args.h = h.rows(0, 1);
  table.activate(args);
  return h.values();
}

inline std::string text(const KernelTable& table, const Named& named) {
  return std::string(isa_name(table.isa)) + ", " + named.name;
}

}  // namespace ktmoe::test
