// Common to tile kernels: the sizes of tiles, panels of activation rows, C blocks, and the unit's
// configuration. Included inside a target's namespace, after its tile policy.
//
// A panel of w rows: [K/32][16 pairs][w][2] bf16; w is 16 but for the last panel, which is only as wide as
// its rows: a single row is thus stored as it is, and decoding reads no padding.
//
// C is [panel][n][columns]: c[panel * n_padded * 16 + (n - n0) * columns + m % 16], n_padded = (n1 - n0) up
// to 32; the last panel has only as many columns as rows of X.

inline constexpr uint32_t kTileRows = 16, kGroupRows = 32, kTileK = 32, kPanelColumns = 16;
inline constexpr size_t kTileBytes = size_t{kTileRows} * kTileK * sizeof(bf16);
KT_INLINE size_t panel_bytes(uint32_t k) { return round_up(k, kTileK) * kPanelColumns * sizeof(bf16); }

KT_INLINE uint32_t panel_width(const Operand& x, uint32_t panel) {
  const uint32_t left = x.rows - panel * kPanelColumns;
  return left < kPanelColumns ? left : kPanelColumns;
}

KT_INLINE uint32_t tile_n_padded(uint32_t n) { return static_cast<uint32_t>(round_up(n, kGroupRows)); }

inline size_t c_floats_tiles(uint32_t m, uint32_t n) { return round_up(m, kPanelColumns) * tile_n_padded(n); }

// The tile configuration of a step: rows of A and of C by columns of B and of C, each of one or two tiles (0:
// no second). Given back when it goes out of scope: idle tiles would make every context switch save them.
class TileScope {
 public:
  ~TileScope() {
    if (columns_[0]) Tile::release();
  }
  void use(uint32_t columns0, uint32_t columns1, uint32_t rows0 = kTileRows, uint32_t rows1 = kTileRows) {
    if (columns_[0] == columns0 && columns_[1] == columns1 && rows_[0] == rows0 && rows_[1] == rows1) return;
    constexpr uint32_t kPairs = kTileK / 2;
    const uint32_t rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, kPairs, kPairs};
    const uint32_t columns[8] = {columns0, columns1, columns0, columns1, kPairs, kPairs, columns0, columns1};
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      if (rows[tile] == 0 || columns[tile] == 0) continue;
      config.column_bytes[tile] = static_cast<uint16_t>(columns[tile] * 4);
      config.rows[tile] = static_cast<uint8_t>(rows[tile]);
    }
    Tile::configure(config);
    columns_[0] = columns0, columns_[1] = columns1;
    rows_[0] = rows0, rows_[1] = rows1;
  }

 private:
  uint32_t columns_[2] = {0, 0}, rows_[2] = {0, 0};
};
