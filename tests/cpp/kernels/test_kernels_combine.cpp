// Are a token's experts added in slot order and rounded once, into the place that was given and no other?
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "kernel_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;
using kernels::CombineArgs;
using kernels::FloatType;

namespace {

enum class Base { kNone, kApart, kInPlace };

// A call of combine with all that it refers to. Outputs are rows of `stride`, of which `columns` are asked
// for.
struct Call {
  uint32_t tokens, slots, columns, hidden_size, stride, rows;
  Guarded<float> y;
  Guarded<int32_t> row;
  Guarded<float> weights;
  Guarded<bf16> hidden;
  CombineArgs args;

  Call(Random& random, uint32_t tokens_, uint32_t slots_, uint32_t columns_)
      : tokens(tokens_),
        slots(slots_),
        columns(columns_),
        hidden_size(1 + random.below(70)),
        stride(columns_ + random.below(2) * 5),
        rows(1 + random.below(tokens_ * slots_)),
        y((rows - 1) * (columns_ + 3) + columns_),
        row(tokens_ * slots_),
        weights(tokens_ * slots_),
        hidden(tokens_ * hidden_size) {
    for (float& v : y) v = random.wide();
    for (int32_t& r : row) r = random.below(4) ? static_cast<int32_t>(random.below(rows)) : -1;
    // Powers of two: products are exact, so the sum is the same whether or not a step is fused.
    for (size_t i = 0; i < weights.size(); ++i)
      weights[i] = row[i] < 0
                       ? NAN
                       : std::ldexp(random.below(2) ? 1.0f : -1.0f, static_cast<int>(random.below(7)) - 3);
    for (bf16& h : hidden) h = to_bf16(random.unit());
    args.y = y.data(), args.y_stride = columns + 3;
    args.row = row.data(), args.weights = weights.data();
    args.tokens = tokens, args.slots = slots, args.columns = columns;
    args.hidden = hidden.data(), args.hidden_size = hidden_size;
    args.out_stride = stride;
  }

  bool computed(uint32_t t) const {
    for (uint32_t p = 0; p < slots; ++p)
      if (row[t * slots + p] >= 0) return true;
    return false;
  }

  // The sum in fp32, in slot order, beginning with `base`.
  float sum(uint32_t t, uint32_t j, float base) const {
    for (uint32_t p = 0; p < slots; ++p) {
      const int32_t r = row[t * slots + p];
      if (r >= 0) base += weights[t * slots + p] * y[static_cast<uint32_t>(r) * (columns + 3) + j];
    }
    return base;
  }
};

float as_float(float x) { return x; }
float as_float(bf16 x) { return to_float(x); }
void set(float& to, float x) { to = x; }
void set(bf16& to, float x) { to = to_bf16(x); }
template <class T>
constexpr FloatType type_of() {
  return std::is_same_v<T, bf16> ? FloatType::kBf16 : FloatType::kFloat32;
}

// Runs a call and counts the outputs that are not, to the bit, the sum of their slots.
template <class Out, class In>
int wrong_outputs(const KernelTable& table, Call& call, Base base_kind, Random& random) {
  const size_t size = (call.tokens - 1) * call.stride + call.columns;
  const Guarded<Out> out(size);
  const Guarded<In> apart(size);
  std::vector<float> base(size, 0.0f);
  call.args.out = out.data(), call.args.out_type = type_of<Out>();
  call.args.base = nullptr, call.args.base_type = type_of<In>();
  if (base_kind != Base::kNone) {
    for (size_t i = 0; i < size; ++i) {
      if (i % call.stride >= call.columns) continue;
      if (base_kind == Base::kInPlace) {
        set(out[i], random.wide());
        base[i] = as_float(out[i]);
      } else {
        set(apart[i], random.wide());
        base[i] = as_float(apart[i]);
      }
    }
    call.args.base = base_kind == Base::kInPlace ? static_cast<const void*>(out.data()) : apart.data();
    if (base_kind == Base::kInPlace) call.args.base_type = type_of<Out>();
  }
  table.combine(call.args);

  int wrong = 0;
  for (size_t i = 0; i < size; ++i) {
    const uint32_t t = static_cast<uint32_t>(i / call.stride), j = static_cast<uint32_t>(i % call.stride);
    Out expected;
    std::memset(&expected, 0xff, sizeof expected);  // as it was, beside the columns
    if (j < call.columns) set(expected, call.sum(t, j, base[i]));
    wrong += std::memcmp(&out[i], &expected, sizeof expected) != 0;
  }
  return wrong;
}

}  // namespace

TEST_CASE("combine: slots in order on top of the base, rounded once, to the bit") {
  for (const KernelTable* table : usable_tables()) {
    Random random(40);
    for (int i = 0; i < 120; ++i) {
      Call call(random, 1 + random.below(6), 1 + random.below(9), 1 + random.below(i % 4 ? 50 : 600));
      const Base base = static_cast<Base>(i % 3);
      INFO(isa_name(table->isa).data(), ": T ", call.tokens, ", P ", call.slots, ", columns ", call.columns,
           ", base ", i % 3);
      CHECK(wrong_outputs<bf16, bf16>(*table, call, base, random) == 0);
      CHECK(wrong_outputs<bf16, float>(*table, call, base, random) == 0);
      CHECK(wrong_outputs<float, bf16>(*table, call, base, random) == 0);
      CHECK(wrong_outputs<float, float>(*table, call, base, random) == 0);
    }
  }
}

TEST_CASE("combine: any weights, within the bound of the rounding") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(41);
    Call call(random, 5, 8, 100);
    for (float& w : call.weights) w = random.unit();
    const Guarded<float> out((call.tokens - 1) * call.stride + call.columns);
    call.args.out = out.data(), call.args.out_type = FloatType::kFloat32;
    table->combine(call.args);
    int wrong = 0;
    for (uint32_t t = 0; t < call.tokens; ++t) {
      for (uint32_t j = 0; j < call.columns; ++j) {
        double sum = 0, size = 0;
        for (uint32_t p = 0; p < call.slots; ++p) {
          const int32_t r = call.row[t * call.slots + p];
          if (r < 0) continue;
          const double term =
              double{call.weights[t * call.slots + p]} * call.y[static_cast<uint32_t>(r) * 103 + j];
          sum += term, size += std::fabs(term);
        }
        // A term is rounded once as a product and at most once in every sum from its own on.
        wrong += !(std::fabs(out[t * call.stride + j] - sum) <= (call.slots + 1) * 0x1p-24 * size);
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("combine: no weights are weights of one") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(44);
    for (int i = 0; i < 30; ++i) {
      Call call(random, 1 + random.below(6), 1 + random.below(9), 1 + random.below(50));
      for (float& w : call.weights) w = 1;
      call.args.weights = nullptr;
      const Base base = static_cast<Base>(i % 3);
      CHECK(wrong_outputs<bf16, float>(*table, call, base, random) == 0);
      CHECK(wrong_outputs<float, bf16>(*table, call, base, random) == 0);
    }
  }
}

TEST_CASE("combine: a token with a hidden state that is not finite is NaN, if anything of it was computed") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(42);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      for (int i = 0; i < 30; ++i) {
        Call call(random, 6, 2, 1 + random.below(40));
        const uint32_t token = random.below(6), where[] = {0, call.hidden_size / 2, call.hidden_size - 1};
        if (i % 5 == 0) call.row[token * 2] = call.row[token * 2 + 1] = -1;
        call.hidden[token * call.hidden_size + where[i % 3]] = to_bf16(bad);
        const Guarded<bf16> out((call.tokens - 1) * call.stride + call.columns);
        call.args.out = out.data(), call.args.out_type = FloatType::kBf16;
        table->combine(call.args);
        int wrong = 0;
        for (uint32_t t = 0; t < call.tokens; ++t)
          for (uint32_t j = 0; j < call.columns; ++j)
            wrong += std::isnan(to_float(out[t * call.stride + j])) != (t == token && call.computed(t));
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("combine: a result that is not finite shows, and stays in its column") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(43);
    Call call(random, 1, 2, 20);
    call.row[0] = 0, call.row[1] = -1;
    call.weights[0] = 1;
    call.y[4] = NAN, call.y[5] = INFINITY;
    const Guarded<bf16> out(20);
    call.args.out = out.data(), call.args.out_type = FloatType::kBf16;
    table->combine(call.args);
    int finite = 0;
    for (uint32_t j = 0; j < 20; ++j) finite += is_finite(out[j]);
    CHECK(std::isnan(to_float(out[4])));
    CHECK(to_float(out[5]) == INFINITY);
    CHECK(finite == 18);
  }
}

TEST_CASE("combine: with every slot skipped the base is rounded as to_bf16 does, around every value") {
  constexpr uint32_t kLows[] = {0x0000, 0x0001, 0x7fff, 0x8000, 0x8001, 0xffff};
  std::vector<float> values;
  for (uint32_t high = 0; high < 65536; ++high)
    for (uint32_t low : kLows) values.push_back(std::bit_cast<float>(high << 16 | low));
  const Guarded<bf16> out(values.size()), hidden(1);
  const Guarded<int32_t> row(1);
  const Guarded<float> weight(1);
  row[0] = -1;
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    CombineArgs args;
    args.row = row.data(), args.weights = weight.data(), args.tokens = 1, args.slots = 1;
    args.columns = static_cast<uint32_t>(values.size()), args.hidden = hidden.data(), args.hidden_size = 1;
    args.base = values.data(), args.base_type = FloatType::kFloat32;
    args.out = out.data(), args.out_type = FloatType::kBf16, args.out_stride = values.size();
    table->combine(args);
    int wrong = 0;
    for (size_t i = 0; i < values.size(); ++i) wrong += out[i].bits != to_bf16(values[i]).bits;
    CHECK(wrong == 0);
  }
}
