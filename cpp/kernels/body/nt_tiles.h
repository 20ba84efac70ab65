// NT on the tile unit: C^T[n, m] (+)= sum_k W[n, k] X[m, k].
//
// The weights are the A operand, 16 rows x 64 bytes straight from the row-major matrix; the activations are
// the K-paired B operand. A step is two weight tiles by two activation panels. The product comes out
// transposed, which after the activation function is the K-paired form that the down projection wants.
//
// Weights are multiplied in place while few activations pass (then memory is the limit). With many, or where
// rows have to be decoded or end inside a tile, groups of 32 rows are brought block by block of K into
// contiguous scratch; sums wait in C between blocks, so the order along K stays.
//
// C is [panel][n][16]: c[(panel * n_padded + n - n0) * 16 + m % 16], n_padded = (n1 - n0) up to 32.

inline constexpr uint32_t kTileRows = 16, kGroupRows = 32, kTileK = 32, kPanelColumns = 16;
// Elements of K in a block copied to scratch: 32 rows of it take 32 KiB.
inline constexpr uint32_t kTileBlockK = 512;
// Up to this many activation rows weights are multiplied in place (measured on Emerald Rapids: at 64 rows 4.2
// against 3.0 TFLOP/s, equal from 256 on, and with blocks and prefetch ahead from there).
inline constexpr uint32_t kInPlaceRows = 128;

KT_INLINE uint32_t tile_n_padded(uint32_t n) { return static_cast<uint32_t>(round_up(n, kGroupRows)); }

inline size_t c_floats_tiles(uint32_t m, uint32_t n) { return round_up(m, kPanelColumns) * tile_n_padded(n); }

inline size_t nt_scratch_bytes_tiles(uint32_t) { return size_t{kGroupRows} * kTileBlockK * sizeof(bf16); }

// The tile configuration of one or two panels, given back when it goes out of scope: idle tiles would make
// every context switch save them.
class TileScope {
 public:
  ~TileScope() {
    if (columns_[0]) Tile::release();
  }
  void use(uint32_t columns0, uint32_t columns1) {
    if (columns_[0] == columns0 && columns_[1] == columns1) return;
    TileConfig config;
    const uint32_t columns[8] = {columns0,   columns1,   columns0, columns1,
                                 kTileK / 2, kTileK / 2, columns0, columns1};
    for (int tile = 0; tile < 8; ++tile) {
      config.column_bytes[tile] = static_cast<uint16_t>(columns[tile] * 4);
      config.rows[tile] = columns[tile] ? kTileRows : 0;
    }
    Tile::configure(config);
    columns_[0] = columns0;
    columns_[1] = columns1;
  }

 private:
  uint32_t columns_[2] = {0, 0};
};

// A block of K of a group of 32 weight rows: where its tiles lie, and which steps of K they are.
struct TileBlock {
  const std::byte* data;
  ptrdiff_t row_stride;
  size_t step0, steps;  // in units of kTileK
};

// The weights behind a block, which are asked for while it is multiplied: some of their rows with every pair
// of panels, a cache line of each of those rows a step.
struct TileAhead {
  const std::byte* data = nullptr;
  ptrdiff_t row_stride = 0;
  uint32_t rows = 0;
};

KT_INLINE uint32_t panel_width(const Operand& x, uint32_t panel) {
  const uint32_t left = x.rows - panel * kPanelColumns;
  return left < kPanelColumns ? left : kPanelColumns;
}

// One block, of one or two tiles of weight rows, against panels p and, when kPanels is 2, p + 1.
template <int kWeights, int kPanels>
KT_INLINE void tile_block(const NtArgs& args, const TileBlock& w, const TileAhead& ahead, uint32_t p,
                          uint32_t n, bool zero_first) {
  const uint32_t n_padded = tile_n_padded(args.n1 - args.n0);
  float* c0 = args.c + (size_t{p} * n_padded + n - args.n0) * kPanelColumns;
  float* c1 = c0 + size_t{n_padded} * kPanelColumns;
  constexpr ptrdiff_t kCStride = kPanelColumns * sizeof(float);
  constexpr size_t kCTile = kTileRows * kPanelColumns;
  if (zero_first) {
    Tile::zero<0>();
    if constexpr (kPanels == 2) Tile::zero<1>();
    if constexpr (kWeights == 2) Tile::zero<2>();
    if constexpr (kWeights == 2 && kPanels == 2) Tile::zero<3>();
  } else {
    Tile::load<0>(c0, kCStride);
    if constexpr (kPanels == 2) Tile::load<1>(c1, kCStride);
    if constexpr (kWeights == 2) Tile::load<2>(c0 + kCTile, kCStride);
    if constexpr (kWeights == 2 && kPanels == 2) Tile::load<3>(c1 + kCTile, kCStride);
  }

  const ptrdiff_t stride0 = panel_width(args.x, p) * 4;
  const ptrdiff_t stride1 = kPanels == 2 ? panel_width(args.x, p + 1) * 4 : 0;
  const std::byte* b0 = args.x.data + p * args.x.stride_bytes + w.step0 * kTileRows * stride0;
  const std::byte* b1 = args.x.data + (p + 1) * args.x.stride_bytes + w.step0 * kTileRows * stride1;
  const std::byte* a0 = w.data;
  const std::byte* a1 = w.data + kTileRows * w.row_stride;
  for (size_t s = 0; s < w.steps; ++s) {
    Tile::load<6>(b0, stride0);
    Tile::load<4>(a0, w.row_stride);
    Tile::dot_bf16<0, 4, 6>();
    if constexpr (kPanels == 2) {
      Tile::load<7>(b1, stride1);
      Tile::dot_bf16<1, 4, 7>();
    }
    if constexpr (kWeights == 2) {
      Tile::load<5>(a1, w.row_stride);
      Tile::dot_bf16<2, 5, 6>();
    }
    if constexpr (kWeights == 2 && kPanels == 2) Tile::dot_bf16<3, 5, 7>();
    a0 += kTileK * sizeof(bf16);
    a1 += kTileK * sizeof(bf16);
    b0 += kTileRows * stride0;
    b1 += kTileRows * stride1;
    for (uint32_t r = 0; r < ahead.rows; ++r)
      __builtin_prefetch(ahead.data + r * ahead.row_stride + static_cast<ptrdiff_t>(s * kCacheLine), 0, 2);
    if constexpr (kPanels == 2) {  // the panels' next tiles, a step ahead of their loads
      for (int line = 0; line < 16; ++line) {
        __builtin_prefetch(b0 + kTileRows * stride0 + line * kCacheLine, 0, 3);
        __builtin_prefetch(b1 + kTileRows * stride1 + line * kCacheLine, 0, 3);
      }
    }
  }

  Tile::store<0>(c0, kCStride);
  if constexpr (kPanels == 2) Tile::store<1>(c1, kCStride);
  if constexpr (kWeights == 2) Tile::store<2>(c0 + kCTile, kCStride);
  if constexpr (kWeights == 2 && kPanels == 2) Tile::store<3>(c1 + kCTile, kCStride);
}

// A block of K against all panels.
template <int kWeights>
void tile_panels(const NtArgs& args, TileScope& scope, const TileBlock& w, const TileAhead& ahead, uint32_t n,
                 bool zero_first) {
  const uint32_t panels = static_cast<uint32_t>(div_up(args.x.rows, kPanelColumns));
  const uint32_t rows_a_pair = static_cast<uint32_t>(div_up(ahead.rows, div_up(panels, 2)));
  TileAhead some = ahead;
  uint32_t left = ahead.rows;
  for (uint32_t p = 0; p < panels; p += 2) {
    some.rows = left < rows_a_pair ? left : rows_a_pair;
    if (p + 1 < panels) {
      scope.use(kPanelColumns, panel_width(args.x, p + 1));
      tile_block<kWeights, 2>(args, w, some, p, n, zero_first);
    } else {
      scope.use(panel_width(args.x, p), 0);
      tile_block<kWeights, 1>(args, w, some, p, n, zero_first);
    }
    left -= some.rows;
    some.data += static_cast<ptrdiff_t>(some.rows) * some.row_stride;
  }
}

// Decodes elements [k0, k1) of `rows` weight rows to `padded` rows of bf16 tiles in scratch, zeros around
// them.
template <class Format>
void fill_tile_block(const WeightView& w, uint32_t n, uint32_t rows, uint32_t padded, size_t k0, size_t k1,
                     std::byte* to) {
  const size_t stride = round_up(k1 - k0, kTileK) * sizeof(bf16);
  for (uint32_t r = 0; r < padded; ++r, to += stride) {
    if (r >= rows) {
      std::memset(to, 0, stride);
      continue;
    }
    const std::byte* row = w.row(n + r);
    std::byte* at = to;
    size_t k = k0;
    for (; k + Vec::kStep <= k1; k += Vec::kStep, at += Vec::kStep * sizeof(bf16))
      Vec::store(at, Unpack<Format>::segment(row, k));
    if (k < k1) Vec::store(at, Unpack<Format>::tail(row, k, k1 - k)), at += Vec::kStep * sizeof(bf16);
    if (at < to + stride) std::memset(at, 0, static_cast<size_t>(to + stride - at));
  }
}

// What follows the block [k0, k1) of group n: the group's next block, or the next group's first.
template <class Format>
KT_INLINE TileAhead behind_block(const NtArgs& args, uint32_t n, size_t k1) {
  const bool same_group = k1 < args.x.k;
  const uint32_t row = same_group ? n : n + kGroupRows;
  if (row >= args.n1) return {};
  const uint32_t rows = args.n1 - row < kGroupRows ? args.n1 - row : kGroupRows;
  return {args.w.row(row) + (same_group ? Format::row_bytes(k1) : 0), args.w.row_stride_bytes, rows};
}

// Weight rows [n, n + rows), at most kWeights tiles of them.
template <class Format, int kWeights>
void nt_tile_group(const NtArgs& args, TileScope& scope, uint32_t n, uint32_t rows) {
  constexpr uint32_t kPadded = kWeights * kTileRows;
  const uint32_t k = args.x.k;
  const bool in_place = Unpack<Format>::kAsStored && rows == kPadded && args.x.rows <= kInPlaceRows;
  bool zero_first = !args.accumulate;
  size_t k0 = 0;
  if (in_place && k >= kTileK) {
    const TileBlock whole{args.w.row(n), args.w.row_stride_bytes, 0, k / kTileK};
    tile_panels<kWeights>(args, scope, whole, {}, n, zero_first);
    zero_first = false;
    k0 = k / kTileK * kTileK;
  }
  for (; k0 < k; k0 += kTileBlockK) {
    const size_t k1 = k0 + kTileBlockK < k ? k0 + kTileBlockK : k;
    fill_tile_block<Format>(args.w, n, rows, kPadded, k0, k1, args.scratch);
    const size_t steps = div_up(k1 - k0, kTileK);
    const ptrdiff_t stride = static_cast<ptrdiff_t>(steps * kTileK * sizeof(bf16));
    const TileBlock block{args.scratch, stride, k0 / kTileK, steps};
    tile_panels<kWeights>(args, scope, block, behind_block<Format>(args, n, k1), n, zero_first);
    zero_first = false;
  }
}

template <class Format>
void nt_tiles(const NtArgs& args) {
  TileScope scope;
  for (uint32_t n = args.n0; n < args.n1; n += kGroupRows) {
    const uint32_t rows = args.n1 - n < kGroupRows ? args.n1 - n : kGroupRows;
    if (rows > kTileRows) {
      nt_tile_group<Format, 2>(args, scope, n, rows);
    } else {
      nt_tile_group<Format, 1>(args, scope, n, rows);
    }
  }
}
