// Are codes and scales the same bits on every instruction set, whatever the shape, the memory and the data?
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "quantize_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr FloatType kTypes[] = {FloatType::kBf16, FloatType::kFloat32};
constexpr Layout kLayouts[] = {Layout::kTight, Layout::kApart, Layout::kOdd};

// What weights look like; every kind takes another way through the search.
enum class Kind { kUnit, kWide, kDenormal, kHuge, kSparse, kNibbles, kOneSign, kTies, kCount };

float draw(Random& random, Kind kind) {
  switch (kind) {
    case Kind::kUnit: return random.unit();
    case Kind::kWide: return random.wide();
    case Kind::kDenormal: return std::ldexp(random.unit(), -static_cast<int>(random.below(24)) - 126);
    case Kind::kHuge: return std::ldexp(random.unit(), 128) * 0.99f;
    case Kind::kSparse: return random.below(20) ? (random.below(2) ? 0.0f : -0.0f) : random.unit();
    case Kind::kNibbles: return std::ldexp(static_cast<float>(static_cast<int>(random.below(16)) - 8), -3);
    case Kind::kOneSign: return std::fabs(random.unit()) + 0.25f;
    case Kind::kTies: return std::ldexp(static_cast<float>(random.below(510)) - 254.5f, -7);
    case Kind::kCount: break;
  }
  return 0;
}

Rows draw_rows(Random& random, uint32_t n, uint32_t k, Kind kind) {
  Rows rows(n, std::vector<float>(k));
  for (auto& row : rows)
    for (float& x : row) x = draw(random, kind);
  return rows;
}

const KernelTable& scalar() { return *kernels::find_table(Isa::kScalar); }

// Rows that differ from those of the scalar table.
int wrong_rows(const KernelTable& table, FormatId format, const Weights& weights) {
  Quantized expected(format, weights.args()), got(format, weights.args(), 5);
  if (expected.run(scalar()) != weights.args().n || got.run(table) != weights.args().n) return -1;
  int wrong = !got.gaps_are_untouched();
  for (uint32_t n = 0; n < weights.args().n; ++n) wrong += got.row(n) != expected.row(n);
  return wrong;
}

}  // namespace

TEST_CASE("quantize: the same bits on every instruction set, every number of columns") {
  for (const KernelTable* table : usable_tables()) {
    Random random(60);
    for (uint32_t k = 1; k <= 200; ++k) {
      const Kind kind = static_cast<Kind>(k % static_cast<uint32_t>(Kind::kCount));
      const Rows rows = draw_rows(random, 2, k, kind);
      for (FloatType type : kTypes) {
        const Weights weights(rows, type, kLayouts[k % 3]);
        for (FormatId format : kQuantizedFormats) {
          INFO(isa_name(table->isa).data(), ": K ", k, ", kind ", static_cast<int>(kind), ", format ",
               static_cast<int>(format), ", type ", static_cast<int>(type));
          CHECK(wrong_rows(*table, format, weights) == 0);
        }
      }
    }
  }
}

TEST_CASE("quantize: the same bits for data of every kind, in long rows") {
  for (const KernelTable* table : usable_tables()) {
    Random random(61);
    for (uint32_t k : {704u, 2048u, 4097u}) {
      for (int i = 0; i < static_cast<int>(Kind::kCount); ++i) {
        const Rows rows = draw_rows(random, 2, k, static_cast<Kind>(i));
        for (FloatType type : kTypes) {
          const Weights weights(rows, type, kLayouts[i % 3]);
          for (FormatId format : kQuantizedFormats) {
            INFO(isa_name(table->isa).data(), ": K ", k, ", kind ", i, ", format ", static_cast<int>(format));
            CHECK(wrong_rows(*table, format, weights) == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("quantize: int8 codes are the nearest multiples of amax / 127") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(62);
    for (int i = 0; i < static_cast<int>(Kind::kCount); ++i) {
      const Rows rows = draw_rows(random, 3, 77, static_cast<Kind>(i));
      const Weights weights(rows, FloatType::kFloat32, Layout::kTight);
      Quantized result(FormatId::kInt8, weights.args());
      REQUIRE(result.run(*table) == 3);
      int wrong = 0;
      for (uint32_t n = 0; n < 3; ++n) {
        float amax = 0;
        for (float x : rows[n]) amax = std::max(amax, std::fabs(x));
        const float scale = amax / 127.0f;
        wrong += !same_bits(result.channel_scale(n), scale);
        for (uint32_t j = 0; j < 77; ++j) {
          const float code = scale > 0 ? std::nearbyint(rows[n][j] / scale) : 0.0f;
          wrong += static_cast<float>(result.code(n, j)) != std::min(std::max(code, -127.0f), 127.0f);
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("quantize: int8 in groups gives back multiples of a scale") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(66);
    for (int i = 0; i < 40; ++i) {
      const uint32_t k = 1 + random.below(100);
      const int power = static_cast<int>(random.below(253)) - 149;
      std::vector<float> row(k);
      std::vector<int> codes(k);
      float scale = 0;
      for (uint32_t j = 0; j < k; ++j) {
        // Up to 17 digits: its product with a code is a float.
        if (j % 32 == 0) scale = std::ldexp(static_cast<float>(1 + random.below(1u << 17)), power);
        codes[j] = j % 32 ? static_cast<int>(random.below(255)) - 127 : 127;
        row[j] = static_cast<float>(codes[j]) * scale;
      }
      const Weights weights({row}, FloatType::kFloat32, kLayouts[i % 3]);
      Quantized result(FormatId::kInt8Group32, weights.args());
      REQUIRE(result.run(*table) == 1);
      int wrong = 0;
      for (uint32_t j = 0; j < k; ++j)
        wrong += result.code(0, j) != codes[j] || result.decoded(0, j) != row[j];
      INFO("K ", k, ", 2^", power);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("quantize: int4 gives back a power of two times nibbles, and two levels of scales") {
  for (const KernelTable* table : usable_tables()) {
    Random random(63);
    for (FormatId format : kQuantizedFormats) {
      if (!is_int4(format)) continue;
      for (int i = 0; i < 40; ++i) {
        const uint32_t k = 1 + random.below(300), g = group_size(format);
        const int power = static_cast<int>(random.below(240)) - 120;
        Rows rows(2, std::vector<float>(k));
        float m = 0;
        for (uint32_t j = 0; j < k; ++j) {
          // An odd number first makes the common power of two that of the row.
          if (j % g == 0) m = i % 2 && j > 0 ? static_cast<float>(1 + random.below(15)) : 1.0f;
          const float q = j % g == 0 ? 7.0f : static_cast<float>(static_cast<int>(random.below(16)) - 8);
          for (auto& row : rows) row[j] = std::ldexp(m * q, power);
        }
        for (FloatType type : kTypes) {
          const Weights weights(rows, type, kLayouts[i % 3]);
          Quantized result(format, weights.args());
          REQUIRE(result.run(*table) == 2);
          int wrong = 0;
          for (uint32_t j = 0; j < k; ++j) wrong += result.decoded(1, j) != rows[1][j];
          INFO(isa_name(table->isa).data(), ": K ", k, ", group ", g, ", 2^", power);
          CHECK(wrong == 0);
        }
      }
    }
  }
}

TEST_CASE("quantize: a row of zeros stays one, with multipliers of 1") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    for (FormatId format : kQuantizedFormats) {
      const Weights weights({std::vector<float>(77, -0.0f)}, FloatType::kBf16, Layout::kTight);
      Quantized result(format, weights.args());
      REQUIRE(result.run(*table) == 1);
      const size_t multipliers = is_int4(format) ? 39 : std::string::npos;
      const std::string row = result.row(0), bytes = row.substr(0, row.size() - sizeof(float));
      int wrong = 0;
      for (size_t i = 0; i < bytes.size(); ++i) wrong += bytes[i] != (i < multipliers ? 0 : 1);
      CHECK(wrong == 0);
      if (format_has_channel_scale(format)) CHECK(same_bits(result.channel_scale(0), 0.0f));
    }
  }
}

TEST_CASE("quantize: no decoded weight overflows, denormal scales clip") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    const float largest = 0x1.fep+127f, tiny = 0x1p-149f;
    const Weights huge({{largest, -largest, largest / 3}}, FloatType::kFloat32, Layout::kTight);
    // bf16 takes the largest float for infinity.
    const float most = std::numeric_limits<float>::max();
    const Weights beyond({{most, -most, most / 3, most * 0.99f}}, FloatType::kFloat32, Layout::kTight);
    const Weights small({{100 * tiny, -tiny, 0}}, FloatType::kFloat32, Layout::kTight);
    for (FormatId format : kQuantizedFormats) {
      Quantized of_huge(format, huge.args()), of_small(format, small.args());
      REQUIRE(of_huge.run(*table) == 1);
      REQUIRE(of_small.run(*table) == 1);
      CHECK(std::isfinite(of_huge.decoded(0, 0)));
      CHECK(std::isfinite(of_huge.decoded(0, 1)));
      CHECK(of_small.code(0, 0) > 0);
      CHECK(of_small.code(0, 2) == 0);
    }
    Quantized of_beyond(FormatId::kInt8Group32, beyond.args());
    REQUIRE(of_beyond.run(*table) == 1);
    CHECK(to_bf16(of_beyond.decoded(0, 0)).bits == to_bf16(largest).bits);
    CHECK(to_bf16(of_beyond.decoded(0, 1)).bits == to_bf16(-largest).bits);
  }
}

TEST_CASE("quantize: the first row that is not finite ends the work, and nothing of it is written") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(64);
    for (float bad : {kNaN, -kNaN, kInfinity, -kInfinity}) {
      for (FloatType type : kTypes) {
        for (FormatId format : kQuantizedFormats) {
          const uint32_t k = 1 + random.below(150), first = random.below(4);
          Weights weights(draw_rows(random, 5, k, Kind::kUnit), type, Layout::kTight);
          weights.set(first, random.below(k), bad);
          weights.set(4, random.below(k), bad);
          QuantizeArgs before = weights.args();
          before.n = first;
          Quantized result(format, weights.args()), expected(format, before);
          CHECK(result.run(*table) == first);
          CHECK(expected.run(scalar()) == first);
          int wrong = 0;
          for (uint32_t n = 0; n < 5; ++n)
            wrong += result.row(n) != (n < first ? expected.row(n) : result.untouched_row());
          CHECK(wrong == 0);
        }
      }
    }
  }
}

TEST_CASE("quantize: rows in reverse order, one row many times, no rows, no columns") {
  for (const KernelTable* table : usable_tables()) {
    INFO(isa_name(table->isa).data());
    Random random(65);
    const Weights weights(draw_rows(random, 3, 50, Kind::kUnit), FloatType::kBf16, Layout::kTight);
    for (FormatId format : kQuantizedFormats) {
      QuantizeArgs backwards = weights.args(), repeated = backwards, none = backwards, narrow = backwards;
      backwards.rows = static_cast<const bf16*>(backwards.rows) + 2 * 50, backwards.stride = -50;
      repeated.stride = 0, none.n = 0, narrow.k = 0;
      Quantized plain(format, weights.args()), reversed(format, backwards), same(format, repeated);
      plain.run(*table), reversed.run(*table), same.run(*table);
      for (uint32_t n = 0; n < 3; ++n) {
        CHECK(reversed.row(n) == plain.row(2 - n));
        CHECK(same.row(n) == plain.row(0));
      }
      CHECK(Quantized(format, none).run(*table) == 0);
      Quantized empty(format, narrow);
      CHECK(empty.run(*table) == 3);
      if (format_has_channel_scale(format)) CHECK(same_bits(empty.channel_scale(2), 0.0f));
    }
  }
}
