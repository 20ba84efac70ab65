// Are the derivatives of the activations right over their whole range, wherever they are read and written?
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "activation_helpers.h"
#include "kernels/contract_training.h"

using namespace ktmoe;
using namespace ktmoe::test;
using kernels::FloatType;
using kernels::kOutputBlock;

namespace {

// ---- the derivatives, in double, by other formulas than the kernels' ----

// An activation is A(g) B(u).
struct Factors {
  double a, a_slope, b = 1, b_slope = 0;
};

double silu_slope(double x) {
  if (std::fabs(x) > 300) return x > 0;
  const double e = std::exp(-x);
  return (1 + e + x * e) / ((1 + e) * (1 + e));
}

double gelu_slope(double x) {
  if (std::fabs(x) > 40) return x > 0;
  return std::erfc(-x * std::sqrt(0.5)) / 2 + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
}

double gelu_tanh_slope(double x) {
  if (std::fabs(x) > 40) return x > 0;
  const double root = std::sqrt(2 / M_PI), y = root * (x + 0.044715 * x * x * x);
  return sigmoid(2 * y) + x / 2 * std::pow(std::cosh(y), -2) * root * (1 + 3 * 0.044715 * x * x);
}

double situ_slope(double x, double b) {
  const double steep = std::pow(std::cosh(x / b), -2);
  return sigmoid(x) * (steep + b * std::tanh(x / b) * sigmoid(-x));
}

// At a clamp the derivative is that of the inside.
Factors gate_factors(const Activation& a, double g) {
  const double limit = a.gated ? a.limit : INFINITY;
  switch (a.kind) {
    case ActivationKind::kSilu: return {silu(std::min(g, limit)), g > limit ? 0 : silu_slope(g)};
    case ActivationKind::kSwigluOai: {
      const double below = std::min(g, limit);
      return {below * sigmoid(a.alpha * below), g > limit ? 0 : silu_slope(a.alpha * g)};
    }
    case ActivationKind::kSwigluStep: return {std::min(silu(g), limit), silu(g) > limit ? 0 : silu_slope(g)};
    case ActivationKind::kGelu: return {gelu(g), gelu_slope(g)};
    case ActivationKind::kGeluTanh: return {gelu_tanh(g), gelu_tanh_slope(g)};
    case ActivationKind::kSitu:
      return {a.beta1 * std::tanh(g / a.beta1) * sigmoid(g), situ_slope(g, a.beta1)};
    case ActivationKind::kRelu2: return {std::pow(std::max(g, 0.0), 2), 2 * std::max(g, 0.0)};
    default: return {NAN, NAN};
  }
}

Factors factors(const Activation& a, double g, double u) {
  Factors f = gate_factors(a, g);
  if (!a.gated) return f;
  const double limit = a.limit;
  f.b = std::min(std::max(u, -limit), limit), f.b_slope = std::fabs(u) <= limit;
  if (a.kind == ActivationKind::kSwigluOai) f.b += 1;
  if (a.kind == ActivationKind::kSitu)
    f.b = a.beta2 * std::tanh(u / a.beta2), f.b_slope = std::pow(std::cosh(u / a.beta2), -2);
  return f;
}

// Each factor with its error in fp32; the product is rounded to bf16. What is too small for a normal number
// counts as zero, so times infinity it is either.
struct Approximate {
  double value, error;
};
bool is_close(float got, double dh, Approximate gate, Approximate up) {
  const double product = gate.value * up.value;
  const bool vanishes = std::fabs(gate.value) < 0x1p-100 && std::isinf(up.value);
  if (std::isnan(product) || (vanishes && std::isnan(got))) return std::isnan(got);
  // The derivative itself may leave the range of fp32.
  const double expected = dh * static_cast<float>(product);
  if (std::fabs(expected) > 0x1.ffp127) return std::isinf(got) && (got > 0) == (expected > 0);
  const double error = std::fabs(gate.value) * up.error + (std::fabs(up.value) + up.error) * gate.error;
  return std::fabs(got - expected) <= 0x1.01p-8 * std::fabs(expected) + std::fabs(dh) * error + 0x1p-126;
}

// Eight units in the last place of a factor's value, of one, or of its operand; beyond 100 that decides
// nothing any more.
Approximate approximate(double value, double operand) {
  if (!std::isfinite(value)) return {value, 0};
  const double size = std::fmax(std::fmax(1, std::fabs(value)), std::fmin(std::fabs(operand), 100));
  return {value, 8 * 0x1p-24 * size + std::fmin(std::fabs(operand), 1e38) * 0x1p-126};
}

// ---- driving the kernels ----

// A call with all that it refers to; the rows of every array end in a gap of their own.
struct Call {
  uint32_t m, n, blocks;
  FloatType type;
  Guarded<float> z, l, weight;
  Guarded<std::byte> gate, up;
  Guarded<bf16> h, d_gate, d_up;
  Guarded<float> grad_weight;
  kernels::ActivateBackwardArgs args;

  Call(const Activation& a, uint32_t m_, uint32_t n_, FloatType type_)
      : m(m_),
        n(n_),
        blocks((n_ + kOutputBlock - 1) / kOutputBlock),
        type(type_),
        z(extent(n_, 2)),
        l(extent(n_, 2)),
        weight(m_),
        gate(extent(n_, 5) * size()),
        up(extent(n_, 5) * size()),
        h(extent(n_, 5)),
        d_gate(extent(n_, 1)),
        d_up(extent(n_, 1)),
        grad_weight(extent(blocks, 3)) {
    args.activation = a, args.m = m, args.n = n;
    args.z = z.data(), args.z_stride = n + 2, args.weight = weight.data();
    args.kept = {gate.data(), a.gated ? up.data() : nullptr, type, h.data(), n + 5};
    args.d_gate = d_gate.data(), args.d_up = a.gated ? d_up.data() : nullptr, args.d_stride = n + 1;
    args.grad_weight = grad_weight.data(), args.grad_weight_stride = blocks + 3;
  }

  size_t size() const { return type == FloatType::kBf16 ? sizeof(bf16) : sizeof(float); }
  size_t extent(uint32_t columns, uint32_t gap) const { return size_t{m - 1} * (columns + gap) + columns; }

  void set(const Guarded<std::byte>& to, uint32_t r, uint32_t j, float x) const {
    const bf16 half = to_bf16(x);
    const void* from = type == FloatType::kBf16 ? static_cast<const void*>(&half) : &x;
    std::memcpy(to.data() + (r * (n + 5) + j) * size(), from, size());
  }
  double kept(const Guarded<std::byte>& rows, uint32_t r, uint32_t j) const {
    const std::byte* p = rows.data() + (r * (n + 5) + j) * size();
    bf16 half;
    float single;
    std::memcpy(&half, p, sizeof half);
    if (type == FloatType::kBf16) return to_float(half);
    std::memcpy(&single, p, sizeof single);
    return single;
  }

  // Everything but gate and up; weights and the scale are powers of two.
  void draw(Random& random, bool with_l) {
    for (uint32_t r = 0; r < m; ++r) {
      weight[r] = std::ldexp(random.below(2) ? 1.0f : -1.0f, static_cast<int>(random.below(4)) - 2);
      for (uint32_t j = 0; j < n; ++j) {
        z[r * (n + 2) + j] = random.unit() + (random.below(2) ? 1.5f : -1.5f);
        l[r * (n + 2) + j] = random.unit();
        h[r * (n + 5) + j] = to_bf16(random.wide());
      }
    }
    if (with_l) args.l = l.data(), args.lora_scale = 0.25f;
  }
  double z_at(uint32_t r, uint32_t j) const {
    const size_t at = r * (n + 2) + j;
    return args.l ? z[at] + args.lora_scale * l[at] : z[at];  // one rounding, fused or not
  }

  // The number of derivatives that are not close to the exact ones.
  int wrong() const {
    int count = 0;
    for (uint32_t r = 0; r < m; ++r) {
      for (uint32_t j = 0; j < n; ++j) {
        const double g = kept(gate, r, j), u = args.activation.gated ? kept(up, r, j) : 0;
        const Factors f = factors(args.activation, g, u);
        const double dh = weight[r] * z_at(r, j);
        count +=
            !is_close(to_float(d_gate[r * (n + 1) + j]), dh, approximate(f.a_slope, g), approximate(f.b, u));
        if (!args.activation.gated) continue;
        count +=
            !is_close(to_float(d_up[r * (n + 1) + j]), dh, approximate(f.a, g), approximate(f.b_slope, u));
      }
    }
    return count;
  }

  // Every result, gaps included.
  std::vector<std::byte> results() const {
    std::vector<std::byte> all;
    const auto append = [&](const auto& array) {
      const auto* bytes = reinterpret_cast<const std::byte*>(array.data());
      all.insert(all.end(), bytes, bytes + array.size() * sizeof array[0]);
    };
    append(d_gate), append(d_up), append(grad_weight);
    return all;
  }
};

constexpr FloatType kTypes[] = {FloatType::kBf16, FloatType::kFloat32};

std::string text(const KernelTable& table, const Named& named, FloatType type) {
  return text(table, named) + (type == FloatType::kBf16 ? ", bf16" : ", fp32");
}

// Every magnitude, the clamps with their neighbors, and what is far outside.
std::vector<float> sweep(Random& random) {
  std::vector<float> values = {0.0f,  -0.0f, 0.625f, -0.625f, 1e-30f, -1e-30f, 17,     -17,      30,
                               -30,   31,    -31,    40,      -40,    41,      -41,    88,       -88,
                               89,    -89,   103,    -103,    105,    -105,    799,    -801,     1e4f,
                               -1e4f, 1e15f, -1e15f, 1e30f,   -1e30f, 3e38f,   -3e38f, INFINITY, -INFINITY};
  for (float limit : {7.0f, 10.0f})
    for (float x : {limit, std::nextafter(limit, 100.0f), std::nextafter(limit, 0.0f)})
      values.push_back(x), values.push_back(-x);
  while (values.size() < 700) values.push_back(random.unit() * 12);
  while (values.size() < 900) values.push_back(random.unit() * 110);
  while (values.size() < 1000)
    values.push_back(std::ldexp(random.unit(), -static_cast<int>(random.below(40))));
  return values;
}

// Whether swiglustep's clamp is so near that fp32 may take the other side of it.
bool is_undecided(const Activation& a, double g) {
  return a.kind == ActivationKind::kSwigluStep && std::fabs(silu(g) - a.limit) < 1e-5;
}

}  // namespace

TEST_CASE("activate_backward: the formulas of this test are the derivatives of the activations") {
  constexpr double kStep = 1e-5;
  for (const Named& named : activations()) {
    INFO(named.name);
    const Activation& a = named.activation;
    Random random(60);
    for (int i = 0; i < 2000; ++i) {
      const double g = random.unit() * 14, u = random.unit() * 14;
      const double edges[] = {std::fabs(g) - a.limit, std::fabs(u) - a.limit, silu(g) - a.limit, g};
      bool at_edge = false;
      for (double edge : edges) at_edge |= std::fabs(edge) < 3 * kStep;
      if (at_edge) continue;
      const Factors f = factors(a, g, u);
      const double by_gate =
          (exact_activation(a, g + kStep, u) - exact_activation(a, g - kStep, u)) / (2 * kStep);
      const double by_up =
          (exact_activation(a, g, u + kStep) - exact_activation(a, g, u - kStep)) / (2 * kStep);
      CHECK(f.a * f.b == doctest::Approx(exact_activation(a, g, u)).epsilon(1e-12));
      CHECK(std::fabs(f.a_slope * f.b - by_gate) < 1e-7);
      if (a.gated) CHECK(std::fabs(f.a * f.b_slope - by_up) < 1e-7);
    }
  }
}

TEST_CASE("activate_backward: every function over its whole range, infinities and clamps included") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      for (FloatType type : kTypes) {
        INFO(text(*table, named, type));
        Random random(61);
        const std::vector<float> gates = sweep(random);
        const uint32_t columns = static_cast<uint32_t>(gates.size());
        // Each gate with an up from nearby, with those at the clamps and around them, and with those far
        // away.
        const std::vector<float> ups = {0.5f,        -3,   7,     -7,     7.0000005f, 10,
                                        -10.000001f, 1e4f, 1e30f, -3e38f, INFINITY};
        Call call(named.activation, static_cast<uint32_t>(ups.size()), columns, type);
        call.draw(random, true);
        for (uint32_t r = 0; r < call.m; ++r) {
          for (uint32_t j = 0; j < columns; ++j) {
            const float g = is_undecided(named.activation, gates[j]) ? 1 : gates[j];
            call.set(call.gate, r, j, g);
            call.set(call.up, r, j, r == 0 ? random.unit() * 12 : ups[r]);
          }
        }
        table->activate_backward(call.args);
        CHECK(call.wrong() == 0);
      }
    }
  }
}

TEST_CASE("activate_backward: nothing finite gives NaN, and a NaN in gate or up gives NaN in both") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      for (FloatType type : kTypes) {
        INFO(text(*table, named, type));
        Random random(62);
        const float finite[] = {0, -0.0f, 1, -1, 50, -50, 90, -90, 800, -800, 1e18f, -1e18f, 3e38f, -3e38f};
        const uint32_t count = std::size(finite);
        Call call(named.activation, count, count, type);
        call.draw(random, false);
        for (uint32_t r = 0; r < count; ++r)
          for (uint32_t j = 0; j < count; ++j)
            call.set(call.gate, r, j, finite[r]), call.set(call.up, r, j, finite[j]);
        table->activate_backward(call.args);
        int wrong = 0;
        for (uint32_t r = 0; r < count; ++r) {
          for (uint32_t j = 0; j < count; ++j) {
            wrong += std::isnan(to_float(call.d_gate[r * (count + 1) + j]));
            wrong += named.activation.gated && std::isnan(to_float(call.d_up[r * (count + 1) + j]));
            call.set(r % 2 || !named.activation.gated ? call.gate : call.up, r, j, NAN);
          }
        }
        CHECK(wrong == 0);
        table->activate_backward(call.args);
        for (uint32_t r = 0; r < count; ++r) {
          for (uint32_t j = 0; j < count; ++j) {
            wrong += !std::isnan(to_float(call.d_gate[r * (count + 1) + j]));
            wrong += named.activation.gated && !std::isnan(to_float(call.d_up[r * (count + 1) + j]));
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("activate_backward: swiglustep at its boundary counts as inside") {
  // sigmoid(32) is 1 in fp32, so the clamp is reached exactly.
  const Named named{"swiglustep, limit 32", {.kind = ActivationKind::kSwigluStep, .limit = 32}};
  for (const KernelTable* table : usable_tables()) {
    INFO(text(*table, named));
    Call call(named.activation, 1, 2, FloatType::kFloat32);
    for (uint32_t j = 0; j < 2; ++j) call.z[j] = 1, call.h[j] = to_bf16(1), call.set(call.up, 0, j, 2);
    call.weight[0] = 1;
    call.set(call.gate, 0, 0, 32), call.set(call.gate, 0, 1, std::nextafter(32.0f, 33.0f));
    table->activate_backward(call.args);
    CHECK(to_float(call.d_gate[0]) == 2);
    CHECK(to_float(call.d_gate[1]) == 0);
    CHECK(to_float(call.d_up[0]) == 32);
    CHECK(to_float(call.d_up[1]) == 32);
  }
}

TEST_CASE("activate_backward: any shape, with and without adapters, and nothing written beside it") {
  for (const KernelTable* table : usable_tables()) {
    Random random(63);
    uint32_t i = 0;
    for (uint32_t n : {1u, 7u, 8u, 9u, 15u, 16u, 17u, 31u, 32u, 33u, 63u, 64u, 65u, 100u}) {
      for (uint32_t m : {1u, 2u, 5u}) {
        const Named& named = activations()[i++ % activations().size()];
        INFO(text(*table, named), ": M ", m, ", N ", n);
        Call call(named.activation, m, n, kTypes[i % 2]);
        call.draw(random, i % 3);
        for (uint32_t r = 0; r < m; ++r)
          for (uint32_t j = 0; j < n; ++j)
            call.set(call.gate, r, j, random.unit() * 6), call.set(call.up, r, j, random.unit() * 6);
        table->activate_backward(call.args);
        CHECK(call.wrong() == 0);

        int wrong = 0;
        for (uint32_t r = 0; r < m; ++r) {
          for (uint32_t b = 0; b < call.blocks; ++b) {
            double sum = 0, size = 0;
            for (uint32_t j = b * kOutputBlock; j < std::min(n, (b + 1) * kOutputBlock); ++j) {
              const double term = call.z_at(r, j) * to_float(call.h[r * (n + 5) + j]);
              sum += term, size += std::fabs(term);
            }
            wrong += !(std::fabs(call.grad_weight[r * (call.blocks + 3) + b] - sum) <= 34 * 0x1p-24 * size);
          }
          if (r + 1 == m) continue;
          wrong += call.d_gate[r * (n + 1) + n].bits != 0xffff;
          for (uint32_t b = 0; b < 3; ++b)
            wrong += !std::isnan(call.grad_weight[r * (call.blocks + 3) + call.blocks + b]);
        }
        if (!named.activation.gated)
          for (bf16 d : call.d_up) wrong += d.bits != 0xffff;
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("activate_backward: the same bits for any cut, and in the memory of gate and up") {
  for (const KernelTable* table : usable_tables()) {
    for (const Named& named : activations()) {
      for (FloatType type : kTypes) {
        INFO(text(*table, named, type));
        Random random(64);
        const uint32_t m = 5, n = 145;
        Call call(named.activation, m, n, type);
        call.draw(random, true);
        for (uint32_t r = 0; r < m; ++r)
          for (uint32_t j = 0; j < n; ++j)
            call.set(call.gate, r, j, random.unit() * 9), call.set(call.up, r, j, random.unit() * 9);
        table->activate_backward(call.args);
        const std::vector<std::byte> whole = call.results();

        for (uint32_t columns : {32u, 64u, 96u}) {
          std::memset(call.d_gate.data(), 0xff, call.d_gate.size() * sizeof(bf16));
          std::memset(call.grad_weight.data(), 0xff, call.grad_weight.size() * sizeof(float));
          for (uint32_t r = 0; r < m; ++r) {
            for (uint32_t j = 0; j < n; j += columns) {
              kernels::ActivateBackwardArgs part = call.args;
              const size_t kept_at = (r * (n + 5) + j) * call.size();
              part.m = 1, part.n = std::min(columns, n - j);
              part.z += r * part.z_stride + j, part.l += r * part.z_stride + j, part.weight += r;
              part.kept.gate = call.gate.data() + kept_at;
              if (named.activation.gated) part.kept.up = call.up.data() + kept_at;
              part.kept.h += r * part.kept.stride + j;
              part.d_gate += r * part.d_stride + j;
              if (named.activation.gated) part.d_up += r * part.d_stride + j;
              part.grad_weight += r * part.grad_weight_stride + j / kOutputBlock;
              table->activate_backward(part);
            }
          }
          CHECK(call.results() == whole);
        }

        if (type != FloatType::kBf16) continue;
        call.args.d_gate = static_cast<bf16*>(call.args.kept.gate);
        call.args.d_up = static_cast<bf16*>(call.args.kept.up);
        call.args.d_stride = call.args.kept.stride;
        table->activate_backward(call.args);
        int wrong = 0;
        for (uint32_t r = 0; r < m; ++r) {
          for (uint32_t j = 0; j < n; ++j) {
            const size_t at = r * (n + 1) + j, kept_at = r * (n + 5) + j;
            wrong += call.args.d_gate[kept_at].bits != call.d_gate[at].bits;
            wrong += named.activation.gated && call.args.d_up[kept_at].bits != call.d_up[at].bits;
          }
        }
        CHECK(wrong == 0);
        CHECK(call.results() == whole);
      }
    }
  }
}
