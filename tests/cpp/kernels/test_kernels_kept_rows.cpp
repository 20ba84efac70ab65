// Do activate and store_rows add what the adapters give, and keep exactly what the activation gets and gives?
#include <doctest/doctest.h>

#include <cmath>
#include <optional>
#include <vector>

#include "activation_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;
using kernels::FloatType;

namespace {

constexpr uint32_t kHeights[] = {1, 2, 5, 15, 16, 17, 31, 33, 48};
constexpr uint32_t kWidths[] = {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64};
// A power of two: the products with it are exact, so sums are the same whether or not they are fused.
constexpr float kScale = 0.5f;

// C + scale L + bias of one projection; L and bias are there or not.
struct Projection {
  Block c, l;
  Guarded<float> bias;
  bool has_l, has_bias;

  Projection(const KernelTable& table, uint32_t m, uint32_t n0, uint32_t n1, bool has_l_, bool has_bias_,
             Random& random)
      : c(table, m, n0, n1), l(table, m, n0, n1), bias(n1 - n0), has_l(has_l_), has_bias(has_bias_) {
    const uint32_t k = 3;
    const Matrix x(m, k, Layout::kTight, [&] { return random.unit(); });
    const Matrix w(n1, k, Layout::kTight, [&] { return 2 * random.unit(); });
    const Matrix adapter(n1, k, Layout::kTight, [&] { return random.unit(); });
    const Packed packed(table, x.activations(), m, k);
    c.multiply(packed.operand, w.weights());
    l.multiply(packed.operand, adapter.weights());
    for (float& b : bias) b = random.unit();
  }

  const float* l_block() const { return has_l ? l.c() : nullptr; }
  const float* bias_values() const { return has_bias ? bias.data() : nullptr; }

  // Row-major, in fp32 and in the order that the contract states.
  std::vector<float> values() const {
    std::vector<float> sums = c.rows();
    const std::vector<float> added = l.rows();
    for (size_t i = 0; i < sums.size(); ++i) {
      if (has_l) sums[i] += kScale * added[i];
      if (has_bias) sums[i] += bias[i % bias.size()];
    }
    return sums;
  }
};

// A row-major array of either type with a gap behind every row, which has to stay as it is.
struct RowArray {
  FloatType type;
  uint32_t rows, columns, stride;
  Guarded<std::byte> bytes;

  RowArray(FloatType type_, uint32_t rows_, uint32_t columns_, uint32_t gap)
      : type(type_),
        rows(rows_),
        columns(columns_),
        stride(columns_ + gap),
        bytes(((rows_ - 1) * stride + columns_) * size()) {}

  size_t size() const { return type == FloatType::kBf16 ? sizeof(bf16) : sizeof(float); }

  // The number of elements that differ in a bit from `values`, rounded, or from what a gap holds at first.
  int wrong(const std::vector<float>& values) const {
    int count = 0;
    for (size_t i = 0; i < bytes.size() / size(); ++i) {
      const size_t row = i / stride, column = i % stride;
      float single;
      bf16 half;
      std::memset(&single, 0xff, sizeof single);
      std::memset(&half, 0xff, sizeof half);
      if (column < columns) {
        single = values[row * columns + column];
        half = to_bf16(single);
      }
      const void* expected = type == FloatType::kBf16 ? static_cast<const void*>(&half) : &single;
      count += std::memcmp(bytes.data() + i * size(), expected, size()) != 0;
    }
    return count;
  }
};

struct Shape {
  uint32_t m, n0, n1, width;
  uint32_t columns() const { return n1 - n0; }

  // A block anywhere, which may be the last of its rows.
  static Shape draw(Random& random) {
    const uint32_t n0 = 16 * random.below(4), n = kWidths[random.below(std::size(kWidths))];
    const bool may_go_on = n % 16 == 0;
    return {kHeights[random.below(std::size(kHeights))], n0, n0 + n,
            n0 + n + (may_go_on ? random.below(2) * 21 : 0)};
  }
};

// A call of activate that keeps its rows.
struct KeepingCall {
  const KernelTable& table;
  const Named& named;
  Shape shape;
  Projection gate, up;
  RowArray kept_gate, kept_up, kept_h;
  kernels::ActivateArgs args;

  KeepingCall(const KernelTable& t, const Named& n, const Shape& s, FloatType type, uint32_t options,
              Random& random)
      : table(t),
        named(n),
        shape(s),
        gate(t, s.m, s.n0, s.n1, options & 1, options & 2, random),
        up(t, s.m, s.n0, s.n1, options & 1, options & 2, random),
        kept_gate(type, s.m, s.columns(), options & 4 ? 3 : 0),
        kept_up(type, s.m, s.columns(), options & 4 ? 3 : 0),
        kept_h(FloatType::kBf16, s.m, s.columns(), options & 4 ? 3 : 0) {
    args.activation = named.activation;
    args.n0 = shape.n0, args.n1 = shape.n1, args.lora_scale = kScale;
    args.c_gate = gate.c.c(), args.l_gate = gate.l_block(), args.gate_bias = gate.bias_values();
    args.kept.type = type, args.kept.stride = kept_gate.stride;
    args.kept.gate = kept_gate.bytes.data();
    args.kept.h = reinterpret_cast<bf16*>(kept_h.bytes.data());
    if (named.activation.gated) {
      args.c_up = up.c.c(), args.l_up = up.l_block(), args.up_bias = up.bias_values();
      args.kept.up = kept_up.bytes.data();
    }
  }

  // Gate, up and H as they are kept, against the sums and the activation of them one row at a time.
  void check_kept() const {
    const std::vector<float> gates = gate.values(), ups = up.values();
    CHECK(kept_gate.wrong(gates) == 0);
    if (named.activation.gated) CHECK(kept_up.wrong(ups) == 0);
    const uint32_t n = shape.columns();
    int wrong = 0;
    for (uint32_t m = 0; m < shape.m; ++m) {
      const auto at = [&](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + m * n, all.begin() + (m + 1) * n);
      };
      const std::vector<float> h = activate_values(table, named.activation, at(gates), at(ups));
      for (uint32_t j = 0; j < n; ++j) wrong += to_float(h_at(m, j)) != h[j];
    }
    CHECK(wrong == 0);
  }

  bf16 h_at(uint32_t m, uint32_t j) const { return args.kept.h[m * kept_h.stride + j]; }
};

}  // namespace

TEST_CASE("activate: rows are kept exactly as the activation gets and gives them") {
  for (const KernelTable* table : usable_tables()) {
    Random random(50);
    for (uint32_t i = 0; i < 160; ++i) {
      const Named& named = activations()[i % activations().size()];
      const Shape shape = Shape::draw(random);
      const FloatType type = i / 2 % 2 ? FloatType::kBf16 : FloatType::kFloat32;
      const uint32_t options = random.below(8);
      INFO(text(*table, named), ": M ", shape.m, ", [", shape.n0, ", ", shape.n1, ") of ", shape.width,
           ", fp32 ", type == FloatType::kFloat32, ", options ", options);
      KeepingCall call(*table, named, shape, type, options, random);
      const Intermediate h(*table, shape.m, shape.width);
      std::memset(h.memory.data(), 0, h.memory.size());
      call.args.h = h.rows(0, shape.m);
      table->activate(call.args);
      call.check_kept();

      const std::vector<float> values = h.values();
      int wrong = 0;
      for (uint32_t m = 0; m < shape.m; ++m) {
        for (uint32_t n = 0; n < shape.width; ++n) {
          const bool inside = n >= shape.n0 && n < shape.n1;
          wrong += values[m * shape.width + n] != (inside ? to_float(call.h_at(m, n - shape.n0)) : 0.0f);
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("activate: what is kept changes no byte of the intermediate, and may be all there is") {
  for (const KernelTable* table : usable_tables()) {
    Random random(51);
    for (uint32_t i = 0; i < 120; ++i) {
      const Named& named = activations()[i % activations().size()];
      const Shape shape = Shape::draw(random);
      INFO(text(*table, named), ": M ", shape.m, ", [", shape.n0, ", ", shape.n1, ") of ", shape.width);
      KeepingCall call(*table, named, shape, FloatType::kBf16, random.below(2) * 2, random);
      const Intermediate kept(*table, shape.m, shape.width), plain(*table, shape.m, shape.width);
      call.args.h = kept.rows(0, shape.m);
      table->activate(call.args);
      call.check_kept();

      kernels::ActivateArgs args = call.args;
      args.kept = {};
      args.h = plain.rows(0, shape.m);
      table->activate(args);
      CHECK(std::memcmp(kept.memory.data(), plain.memory.data(), plain.memory.size()) == 0);

      std::memset(call.kept_gate.bytes.data(), 0xff, call.kept_gate.bytes.size());
      std::memset(call.kept_h.bytes.data(), 0xff, call.kept_h.bytes.size());
      call.args.h.data = nullptr;
      table->activate(call.args);
      call.check_kept();
    }
  }
}

TEST_CASE("activate: adapters without rows to keep, and one thing kept without the others") {
  for (const KernelTable* table : usable_tables()) {
    Random random(52);
    for (uint32_t i = 0; i < 40; ++i) {
      const Named& named = activations()[i % activations().size()];
      const Shape shape = Shape::draw(random);
      INFO(text(*table, named), ": M ", shape.m, ", [", shape.n0, ", ", shape.n1, ")");
      KeepingCall call(*table, named, shape, FloatType::kFloat32, 3, random);
      const Intermediate all(*table, shape.m, shape.width), none(*table, shape.m, shape.width);
      call.args.h = all.rows(0, shape.m);
      table->activate(call.args);

      KeepingCall again = KeepingCall(*table, named, shape, FloatType::kFloat32, 3, random);
      kernels::ActivateArgs args = call.args;
      args.kept = {};
      args.h = none.rows(0, shape.m);
      table->activate(args);
      CHECK(std::memcmp(all.memory.data(), none.memory.data(), none.memory.size()) == 0);

      again.args.kept.gate = again.args.kept.up = nullptr;
      again.args.h = none.rows(0, shape.m);
      table->activate(again.args);
      const size_t bytes = again.kept_gate.bytes.size();
      const std::vector<std::byte> untouched(bytes, std::byte{0xff});
      CHECK(std::memcmp(again.kept_gate.bytes.data(), untouched.data(), bytes) == 0);
      CHECK(!std::isnan(to_float(again.h_at(shape.m - 1, shape.columns() - 1))));
    }
  }
}

TEST_CASE("activate: a row is kept with the same bits alone and in any batch") {
  for (const KernelTable* table : usable_tables()) {
    const Named& named = activations()[6];
    const uint32_t m = 37, n = 50, k = 9;
    Random random(53);
    const Matrix w(n, k, Layout::kTight, [&] { return random.unit(); });
    const Matrix x(m, k, Layout::kTight, [&] { return random.wide(); });
    std::vector<bf16> whole;
    for (uint32_t rows : {m, 1u}) {
      for (uint32_t m0 = 0; m0 < m; m0 += rows) {
        RowsView view = x.activations();
        view.data += m0 * view.stride;
        const Packed packed(*table, view, rows, k);
        Block block(*table, rows, 0, n);
        block.multiply(packed.operand, w.weights());
        const Guarded<bf16> gate(rows * n), up(rows * n), h(rows * n);
        kernels::ActivateArgs args;
        args.activation = named.activation;
        args.c_gate = args.c_up = args.l_gate = args.l_up = block.c(), args.lora_scale = 1.5f;
        args.n1 = n, args.h = Operand{nullptr, 0, nullptr, rows, n};
        args.kept = {gate.data(), up.data(), FloatType::kBf16, h.data(), n};
        table->activate(args);
        if (rows == m) whole.assign(h.begin(), h.end());
        CHECK(std::memcmp(h.data(), whole.data() + m0 * n, h.size() * sizeof(bf16)) == 0);
      }
    }
  }
}

TEST_CASE("store_rows: adapters and biases are added in order, rounded to bf16 on demand") {
  for (const KernelTable* table : usable_tables()) {
    Random random(54);
    for (uint32_t m : kHeights) {
      for (uint32_t n : kWidths) {
        for (uint32_t options = 0; options < 8; ++options) {
          const FloatType type = options & 4 ? FloatType::kBf16 : FloatType::kFloat32;
          INFO(isa_name(table->isa).data(), ": M ", m, ", N ", n, ", options ", options);
          const Projection projection(*table, m, 0, n, options & 1, options & 2, random);
          const RowArray y(type, m, n, random.below(2) * 3);
          kernels::StoreRowsArgs args;
          args.c = projection.c.c(), args.l = projection.l_block(), args.lora_scale = kScale;
          args.bias = projection.bias_values(), args.m = m, args.n = n;
          args.y = y.bytes.data(), args.y_type = type, args.y_stride = y.stride;
          table->store_rows(args);
          CHECK(y.wrong(projection.values()) == 0);
        }
      }
    }
  }
}
