// Is the emulated tile unit the tile unit? Against a model written from the definition, its faults, and,
// where there is AMX, the hardware.
#include <doctest/doctest.h>

#include "kernel_helpers.h"
#include "kernels/targets/includes.h"
#include "runtime_helpers.h"

namespace ktmoe::test::emulated {
#include "kernels/targets/region-inl.h"
#include "kernels/policy/tile_emu.h"
}  // namespace ktmoe::test::emulated

#if defined(__x86_64__)
namespace ktmoe::test::hardware {
#include "kernels/targets/region-inl.h"
#include "kernels/policy/tile_amx.h"
}  // namespace ktmoe::test::hardware
#endif

using namespace ktmoe;
using namespace ktmoe::test;
using emulated::Tile;
using emulated::TileConfig;

namespace {

struct TileShape {
  int rows, pairs, columns;  // C is [rows][columns], A [rows][pairs][2], B [pairs][columns][2]
};

// Tile 0 is C, 4 is A and 6 is B, as the kernels have them.
template <class Config = TileConfig>
Config config_of(const TileShape& s) {
  Config config;
  const auto set = [&](int tile, int rows, int columns) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.column_bytes[tile] = static_cast<uint16_t>(columns * 4);
  };
  set(0, s.rows, s.columns), set(4, s.rows, s.pairs), set(6, s.pairs, s.columns);
  return config;
}

// Operands of one product, in arrays of the largest size, rows 16 dwords apart.
struct Product {
  bf16 a[16][16][2], b[16][16][2];
  float c[16][16];
};

constexpr ptrdiff_t kStride = 64;

// The C that a tile unit makes of a product.
template <class Unit, class Config>
void run(const TileShape& s, Product& p) {
  Unit::configure(config_of<Config>(s));
  Unit::template load<0>(p.c, kStride);
  Unit::template load<4>(p.a, kStride);
  Unit::template load<6>(p.b, kStride);
  Unit::template dot_bf16<0, 4, 6>();
  Unit::template store<0>(p.c, kStride);
  Unit::release();
}

// ---- the model ----

float without_denormals(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float step(bf16 a, bf16 b, float sum) {
  return without_denormals(std::fma(without_denormals(to_float(a)), without_denormals(to_float(b)), sum));
}

void model(const TileShape& s, Product& p) {
  for (int n = 0; n < s.rows; ++n) {
    for (int m = 0; m < s.columns; ++m) {
      float sum[2] = {0, 0};
      for (int k = 0; k < s.pairs; ++k)
        for (int half = 0; half < 2; ++half) sum[half] = step(p.a[n][k][half], p.b[k][m][half], sum[half]);
      const float both = without_denormals(sum[0] + sum[1]);
      p.c[n][m] = without_denormals(without_denormals(p.c[n][m]) + both);
    }
  }
}

// ---- operands ----

enum class Kind { kWide, kBits, kTiny, kHuge, kBorder, kPlain, kSmallest, kLargest };

// Of the exponents whose products the emulator does not check one by one: -50 to 62.
float plain(int exponent, Random& random) {
  const float size = std::ldexp(1 + static_cast<float>(random.below(128)) / 128, exponent);
  return random.below(2) ? size : -size;
}

float next(Kind kind, Random& random) {
  switch (kind) {
    case Kind::kWide: return random.wide();
    case Kind::kBits: return std::bit_cast<float>(random.bits());  // NaN, infinities and denormals among them
    case Kind::kTiny: return std::ldexp(random.unit(), -60 - static_cast<int>(random.below(20)));
    case Kind::kHuge: return std::ldexp(random.unit(), 60 + static_cast<int>(random.below(8)));
    case Kind::kBorder: return std::ldexp(random.unit(), -62 - static_cast<int>(random.below(3)));
    case Kind::kPlain: return plain(static_cast<int>(random.below(113)) - 50, random);
    case Kind::kSmallest: return plain(-50, random);
    case Kind::kLargest: return plain(62, random);
  }
  return 0;
}

Product random_product(Kind kind, Random& random) {
  Product p;
  for (auto& row : p.a)
    for (auto& pair : row)
      for (bf16& x : pair) x = random.below(8) ? to_bf16(next(kind, random)) : bf16{0};
  for (auto& row : p.b)
    for (auto& pair : row)
      for (bf16& x : pair) x = random.below(8) ? to_bf16(next(kind, random)) : bf16{0};
  for (auto& row : p.c)
    for (float& x : row) x = next(kind, random) * (kind == Kind::kBits ? 1.0f : next(kind, random));
  return p;
}

// Outputs that differ; a NaN equals every NaN, its payload is not part of the definition.
int differences(const Product& p, const Product& q) {
  int count = 0;
  for (int n = 0; n < 16; ++n)
    for (int m = 0; m < 16; ++m)
      count += !same_bits(p.c[n][m], q.c[n][m]) && !(std::isnan(p.c[n][m]) && std::isnan(q.c[n][m]));
  return count;
}

constexpr Kind kKinds[] = {Kind::kWide,   Kind::kBits,  Kind::kTiny,     Kind::kHuge,
                           Kind::kBorder, Kind::kPlain, Kind::kSmallest, Kind::kLargest};

template <class Action>
std::string fault_of(Action action) {
  const std::string message = message_of<std::logic_error>(action);
  Tile::release();
  return message;
}

constexpr TileShape kFull{16, 16, 16};
alignas(64) std::byte memory[1024];

}  // namespace

TEST_CASE("tile emulator: products have the bits of the model, whatever the shape and the numbers") {
  Random random(20);
  for (Kind kind : kKinds) {
    CAPTURE(static_cast<int>(kind));
    int wrong = 0;
    for (int i = 0; i < 60; ++i) {
      const auto size = [&] { return 1 + static_cast<int>(random.below(16)); };
      const TileShape shape = i % 2 ? kFull : TileShape{size(), size(), size()};
      Product emulated = random_product(kind, random), modeled = emulated;
      run<Tile, TileConfig>(shape, emulated);
      model(shape, modeled);
      wrong += differences(emulated, modeled);
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("tile emulator: hand-computed examples") {
  const auto dot = [](std::initializer_list<float> a, std::initializer_list<float> b, float c) {
    Product p{};
    for (size_t i = 0; i < a.size(); ++i) p.a[0][i / 2][i % 2] = to_bf16(a.begin()[i]);
    for (size_t i = 0; i < b.size(); ++i) p.b[i / 2][0][i % 2] = to_bf16(b.begin()[i]);
    p.c[0][0] = c;
    run<Tile, TileConfig>({1, 16, 1}, p);
    return p.c[0][0];
  };
  CHECK(dot({2, 3}, {5, 7}, 1) == 32);
  // Even and odd positions are summed apart: 2^30 swallows the 1 beside it only within its own sum.
  CHECK(dot({0x1p30f, 1, -0x1p30f, 0}, {1, 1, 1, 1}, 0) == 1);
  CHECK(dot({0x1p30f, 0, 1, 0, -0x1p30f, 0}, {1, 1, 1, 1, 1, 1}, 0) == 0);
  CHECK(dot({0x1p-130f}, {0x1p100f}, 0) == 0);         // a denormal input is zero
  CHECK(dot({0x1p-70f}, {0x1p-70f}, 0) == 0);          // so is a denormal result
  CHECK(dot({0}, {1}, 0x1p-130f) == 0);                // and a denormal C
  CHECK(dot({0x1p-63f}, {0x1p-63f}, 0) == 0x1p-126f);  // the smallest that is not
  CHECK(dot({0x1p100f}, {0x1p100f}, 0) == INFINITY);
  CHECK(std::isnan(dot({0x1p100f, 0x1p100f}, {0x1p100f, -0x1p100f}, 0)));
  CHECK(std::isnan(dot({INFINITY}, {0}, 0)));
  CHECK(std::isnan(dot({1}, {1}, NAN)));
}

TEST_CASE("tile emulator: only the tile's own rows and bytes are loaded, and stored") {
  const TileShape shape{3, 16, 5};
  Guarded<float> c(2 * 16 + 5);  // the last row ends at its fifth column
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i);
  Guarded<float> out(2 * 16 + 5);
  Tile::configure(config_of(shape));
  Tile::load<0>(c.data(), kStride);
  Tile::store<0>(out.data(), kStride);
  Tile::release();
  int wrong = 0;
  for (size_t i = 0; i < out.size(); ++i) wrong += i % 16 < 5 ? out[i] != c[i] : !std::isnan(out[i]);
  CHECK(wrong == 0);
}

TEST_CASE("tile emulator: configuring and zeroing clear tiles, releasing ends them") {
  Product p{};
  for (auto& row : p.c)
    for (float& x : row) x = 1;
  Tile::configure(config_of(kFull));
  Tile::load<0>(p.c, kStride);
  Tile::zero<0>();
  Tile::store<0>(p.c, kStride);
  CHECK(p.c[15][15] == 0);
  p.c[15][15] = 1;
  Tile::load<0>(p.c, kStride);
  Tile::configure(config_of(kFull));
  Tile::store<0>(p.c, kStride);
  CHECK(p.c[15][15] == 0);
  Tile::release();
  CHECK_THROWS_AS(Tile::store<0>(p.c, kStride), std::logic_error);
}

TEST_CASE("tile emulator: faults of a configuration") {
  const auto fault = [](auto change) {
    return fault_of([&] {
      TileConfig config = config_of(kFull);
      change(config);
      Tile::configure(config);
    });
  };
  CHECK(fault([](TileConfig& c) { c.palette = 2; }) == "amx_emu: a palette other than 1");
  CHECK(fault([](TileConfig& c) { c.rows[3] = 17; }) == "amx_emu: a tile has more than 16 rows");
  CHECK(fault([](TileConfig& c) { c.column_bytes[4] = 65; }) == "amx_emu: a tile row has more than 64 bytes");
  CHECK(fault([](TileConfig& c) { c.rows[5] = 4; }) == "amx_emu: a tile has rows or columns, not both");
  CHECK(fault([](TileConfig& c) { c.column_bytes[5] = 4; }) ==
        "amx_emu: a tile has rows or columns, not both");
  CHECK(fault([](TileConfig& c) { c.rows[8] = 1, c.column_bytes[8] = 4; }) ==
        "amx_emu: a tile beyond the eighth is configured");
  CHECK(fault([](TileConfig& c) { c.reserved[2] = 1; }) != "(no exception)");
  CHECK(fault([](TileConfig&) {}) == "(no exception)");
}

TEST_CASE("tile emulator: faults of a tile that is not configured") {
  const std::string none = "amx_emu: a tile is used without a configuration";
  const std::string other = "amx_emu: a tile is used that is not configured";
  CHECK(fault_of([] { Tile::zero<0>(); }) == none);
  CHECK(fault_of([] { Tile::load<0>(memory, kStride); }) == none);
  CHECK(fault_of([] { Tile::store<0>(memory, kStride); }) == none);
  CHECK(fault_of([] { Tile::dot_bf16<0, 4, 6>(); }) == none);
  const auto configured = [](auto use) {
    return fault_of([&] {
      Tile::configure(config_of(kFull));
      use();
    });
  };
  CHECK(configured([] { Tile::zero<1>(); }) == other);
  CHECK(configured([] { Tile::load<1>(memory, kStride); }) == other);
  CHECK(configured([] { Tile::store<1>(memory, kStride); }) == other);
  CHECK(configured([] { Tile::dot_bf16<1, 4, 6>(); }) == other);
  CHECK(configured([] { Tile::dot_bf16<0, 5, 6>(); }) == other);
  CHECK(configured([] { Tile::dot_bf16<0, 4, 7>(); }) == other);
}

TEST_CASE("tile emulator: faults of a product whose tiles do not fit") {
  const auto fault = [](auto change) {
    return fault_of([&] {
      TileConfig config = config_of({8, 8, 8});
      change(config);
      Tile::configure(config);
      Tile::dot_bf16<0, 4, 6>();
    });
  };
  CHECK(fault([](TileConfig& c) { c.rows[0] = 7; }) == "amx_emu: TDPBF16PS: rows of C and A differ");
  CHECK(fault([](TileConfig& c) { c.column_bytes[0] = 28; }) ==
        "amx_emu: TDPBF16PS: columns of C and B differ");
  CHECK(fault([](TileConfig& c) { c.rows[6] = 7; }) == "amx_emu: TDPBF16PS: K of A and B differ");
  CHECK(fault([](TileConfig& c) { c.column_bytes[4] = 30; }) != "(no exception)");
  CHECK(fault([](TileConfig& c) { c.column_bytes[0] = c.column_bytes[6] = 30; }) != "(no exception)");
  CHECK(fault([](TileConfig&) {}) == "(no exception)");
}

TEST_CASE("tile emulator: a product of a tile with itself faults") {
  const auto fault = [](auto use) {
    return fault_of([&] {
      Tile::configure(config_of(kFull));
      use();
    });
  };
  CHECK(fault([] { Tile::dot_bf16<0, 0, 6>(); }) != "(no exception)");
  CHECK(fault([] { Tile::dot_bf16<0, 4, 0>(); }) != "(no exception)");
  CHECK(fault([] { Tile::dot_bf16<0, 4, 4>(); }) != "(no exception)");
}

#if defined(__x86_64__)
TEST_CASE("tile emulator: the bits of the hardware" * doctest::skip(!cpu_features().amx)) {
  Random random(21);
  for (Kind kind : kKinds) {
    CAPTURE(static_cast<int>(kind));
    int wrong = 0;
    for (int i = 0; i < 200; ++i) {
      const auto size = [&] { return 1 + static_cast<int>(random.below(16)); };
      const TileShape shape = i % 2 ? kFull : TileShape{size(), size(), size()};
      Product emulated = random_product(kind, random), real = emulated;
      run<Tile, TileConfig>(shape, emulated);
      run<hardware::Tile, hardware::TileConfig>(shape, real);
      wrong += differences(emulated, real);
    }
    CHECK(wrong == 0);
  }
}
#endif
