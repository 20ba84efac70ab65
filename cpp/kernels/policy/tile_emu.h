// The tile unit of AMX in portable code, bit for bit: what the hardware faults on throws, what it leaves
// undefined is poisoned. Included inside a target's namespace, in place of tile_amx.h.

#include "kernels/policy/tile_product_emu.h"

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tile instructions are not inlined: each is a page of code, which would take minutes to compile everywhere.
#define KT_TILE_CALL __attribute__((noinline))
struct Tile {
  struct Register {
    std::byte bytes[16][64];
  };
  struct State {
    bool configured = false;
    TileConfig config;
    Register tile[8];
  };
  static State& state() {
    thread_local State s;
    return s;
  }

  static void fault(const char* what) { throw std::logic_error(std::string("amx_emu: ") + what); }

  static void configure(const TileConfig& config) {
    if (config.palette != 1) fault("a palette other than 1");
    for (uint8_t reserved : config.reserved)
      if (reserved != 0) fault("a reserved byte is set");
    for (int i = 0; i < 16; ++i) {
      if (i >= 8 && (config.rows[i] || config.column_bytes[i]))
        fault("a tile beyond the eighth is configured");
      if (config.rows[i] > 16) fault("a tile has more than 16 rows");
      if (config.column_bytes[i] > 64) fault("a tile row has more than 64 bytes");
      if ((config.rows[i] == 0) != (config.column_bytes[i] == 0))
        fault("a tile has rows or columns, not both");
    }
    State& s = state();
    s.configured = true;
    s.config = config;
    std::memset(s.tile, 0, sizeof s.tile);  // LDTILECFG zeroes all tiles
  }
  static void release() {
    State& s = state();
    s.configured = false;
    std::memset(s.tile, 0xff, sizeof s.tile);  // NaN, should anyone look
  }

  static State& checked(int id) {
    State& s = state();
    if (!s.configured) fault("a tile is used without a configuration");
    if (s.config.rows[id] == 0) fault("a tile is used that is not configured");
    return s;
  }
  template <int kId>
  static KT_TILE_CALL void zero() {
    std::memset(&checked(kId).tile[kId], 0, sizeof(Register));
  }
  template <int kId>
  static KT_TILE_CALL void load(const void* p, ptrdiff_t stride_bytes) {
    State& s = checked(kId);
    std::memset(&s.tile[kId], 0, sizeof(Register));
    for (int r = 0; r < s.config.rows[kId]; ++r)
      std::memcpy(s.tile[kId].bytes[r], static_cast<const std::byte*>(p) + r * stride_bytes,
                  s.config.column_bytes[kId]);
  }
  template <int kId>
  static void load_past_l1(const void* p, ptrdiff_t stride_bytes) {
    load<kId>(p, stride_bytes);
  }
  template <int kId>
  static KT_TILE_CALL void store(void* p, ptrdiff_t stride_bytes) {
    State& s = checked(kId);
    for (int r = 0; r < s.config.rows[kId]; ++r)
      std::memcpy(static_cast<std::byte*>(p) + r * stride_bytes, s.tile[kId].bytes[r],
                  s.config.column_bytes[kId]);
  }
  // Rows and dwords of K of a product, when the configuration allows it. Products are of all 16 columns, as
  // those that a tile does not have are never stored.
  struct Shape {
    int rows, dwords;
  };
  template <int kC, int kA, int kB>
  static Shape checked_product(const char* name) {
    const auto fault = [&](const char* what) { Tile::fault((std::string(name) + ": " + what).c_str()); };
    if (kC == kA || kC == kB || kA == kB) fault("a tile is used twice");
    State& s = checked(kC);
    checked(kA), checked(kB);
    for (int id : {kC, kA, kB})
      if (s.config.column_bytes[id] % 4 != 0) fault("a row is not whole dwords");
    const Shape shape{s.config.rows[kA], s.config.column_bytes[kA] / 4};
    if (s.config.rows[kC] != shape.rows) fault("rows of C and A differ");
    if (s.config.column_bytes[kC] != s.config.column_bytes[kB]) fault("columns of C and B differ");
    if (s.config.rows[kB] != shape.dwords) fault("K of A and B differ");
    return shape;
  }
  template <int kC, int kA, int kB>
  static KT_TILE_CALL void dot_bf16() {
    const Shape shape = checked_product<kC, kA, kB>("TDPBF16PS");
    State& s = state();
    TileProduct::add_bf16(s.tile[kC].bytes, s.tile[kA].bytes, s.tile[kB].bytes, shape.rows, shape.dwords);
  }
  template <int kC, int kA, int kB>
  static KT_TILE_CALL void dot_int8() {
    const Shape shape = checked_product<kC, kA, kB>("TDPBSSD");
    State& s = state();
    TileProduct::add_int8(s.tile[kC].bytes, s.tile[kA].bytes, s.tile[kB].bytes, shape.rows, shape.dwords);
  }
};
#undef KT_TILE_CALL
