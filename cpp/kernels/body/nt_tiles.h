// NT on the tile unit: C^T[n, m] (+)= sum_k W[n, k] X[m, k].
//
// The weights are the A operand, 16 rows x 64 bytes straight from the row-major matrix; the activations are
// the K-paired B operand. A step is two weight tiles by two activation panels. The product comes out
// transposed, which after the activation function is the K-paired form that the down projection wants.
//
// C stays in the tiles for up to kTileBlockK elements of K. With few activations the weights are multiplied
// in place (then memory is the limit). With many, the first pair of panels multiplies them in place and
// leaves them in scratch, tile by tile, where the other panels find them. Rows that have to be decoded or end
// inside a tile are brought to scratch first. Between blocks of K sums wait in C, so the order along K stays.
//
// A Product says what is multiplied: bf16 pairs into fp32, or int8 quads into int32, which become fp32 when
// all of K is done. The bytes of tiles, panels and blocks are the same for both; what counts steps counts 64
// bytes of a row as the product takes it.
//
// C is [panel][n][columns]: c[panel * n_padded * 16 + (n - n0) * columns + m % 16], n_padded = (n1 - n0) up
// to 32; the last panel has only as many columns as rows of X.

inline constexpr uint32_t kTileRows = 16, kGroupRows = 32, kTileK = 32, kPanelColumns = 16;
inline constexpr size_t kTileBytes = size_t{kTileRows} * kTileK * sizeof(bf16);
// Steps of K in a block: long, since waiting in C costs as much as two steps, but 32 rows of it (128 KiB) and
// the activations must stay in the second-level cache.
inline constexpr uint32_t kTileBlockSteps = 64;
// Up to this many activation rows weights are multiplied in place.
inline constexpr uint32_t kInPlaceRows = 128;

KT_INLINE uint32_t tile_n_padded(uint32_t n) { return static_cast<uint32_t>(round_up(n, kGroupRows)); }

inline size_t c_floats_tiles(uint32_t m, uint32_t n) { return round_up(m, kPanelColumns) * tile_n_padded(n); }

inline size_t nt_scratch_bytes_tiles(uint32_t k) {
  const size_t steps = div_up(k, kTileK);
  return (steps < kTileBlockSteps ? steps : kTileBlockSteps) * 2 * kTileBytes;
}

struct TileBf16 {
  static constexpr uint32_t kStep = kTileK, kSegment = Vec::kStep;
  static constexpr bool kIsInteger = false;
  template <class Format>
  static constexpr bool as_stored() {
    return Unpack<Format>::kAsStored;
  }
  template <int kC, int kA, int kB>
  static KT_INLINE void dot() {
    Tile::dot_bf16<kC, kA, kB>();
  }
  template <class Row>
  static KT_INLINE void store(std::byte* to, const Row& row, size_t k) {
    Vec::store(to, row.segment(k));
  }
  template <class Row>
  static KT_INLINE void store_tail(std::byte* to, const Row& row, size_t k, size_t count) {
    Vec::store(to, row.tail(k, count));
  }
};

struct TileInt8 {
  static constexpr uint32_t kStep = 2 * kTileK, kSegment = kByteStep;
  static constexpr bool kIsInteger = true;
  template <class Format>
  static constexpr bool as_stored() {
    return Unpack<Format>::kBytesAsStored;
  }
  template <int kC, int kA, int kB>
  static KT_INLINE void dot() {
    Tile::dot_int8<kC, kA, kB>();
  }
  template <class Row>
  static KT_INLINE void store(std::byte* to, const Row& row, size_t k) {
    Vec::store_bytes(to, row.bytes(k));
  }
  template <class Row>
  static KT_INLINE void store_tail(std::byte* to, const Row& row, size_t k, size_t count) {
    Vec::store_bytes(to, row.bytes_tail(k, count));
  }
};

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

// A block of K of a group of 32 weight rows, as they are stored or as tiles in scratch.
struct TileBlock {
  const std::byte* data;
  ptrdiff_t row_stride;
  size_t step0, steps;
  ptrdiff_t step_bytes, second_tile;

  static KT_INLINE TileBlock in_place(const std::byte* rows, ptrdiff_t row_stride, size_t step0,
                                      size_t steps) {
    return {rows, row_stride, step0, steps, kTileK * sizeof(bf16), kTileRows * row_stride};
  }
  template <int kWeights>
  static KT_INLINE TileBlock in_scratch(const std::byte* tiles, size_t step0, size_t steps) {
    return {tiles, kTileK * sizeof(bf16), step0, steps, kWeights * kTileBytes, kTileBytes};
  }
};

// Whose tiles a block's weights are read from, and whether they are left in scratch on the way.
enum class Weights { kPassing, kLeftInScratch, kFromScratch };

KT_INLINE uint32_t panel_width(const Operand& x, uint32_t panel) {
  const uint32_t left = x.rows - panel * kPanelColumns;
  return left < kPanelColumns ? left : kPanelColumns;
}

template <Weights kFrom, int kTile>
KT_INLINE void load_weights(const std::byte* tile, ptrdiff_t row_stride) {
  if constexpr (kFrom == Weights::kFromScratch) {
    Tile::load_past_l1<kTile>(tile, row_stride);
  } else {
    Tile::load<kTile>(tile, row_stride);
  }
}

// Decoding waits for memory alone: rows are asked for some steps ahead, at their end those behind them.
KT_INLINE void prefetch_rows(const TileBlock& w, size_t step) {
  constexpr size_t kAhead = 8;
  const size_t at = step + kAhead;
  const std::byte* row =
      at < w.steps ? w.data + at * kCacheLine : w.data + w.second_tile + (at - w.steps) * kCacheLine;
  for (uint32_t r = 0; r < kTileRows; ++r, row += w.row_stride) __builtin_prefetch(row, 0, 3);
}

// One block, of one or two tiles of weight rows, against panels p and, when kPanels is 2, p + 1. Scratch,
// which no other panel needs soon, is loaded past the first-level cache; activations are not (Emerald Rapids:
// 5 %).
template <class Product, int kWeights, int kPanels, Weights kFrom>
KT_INLINE void tile_block(const NtArgs& args, const TileBlock& w, uint32_t p, uint32_t n, bool zero_first) {
  // A column is 4 bytes in both: a number of C, two or four of X.
  const ptrdiff_t stride0 = panel_width(args.x, p) * 4;
  const ptrdiff_t stride1 = kPanels == 2 ? panel_width(args.x, p + 1) * 4 : 0;
  const ptrdiff_t panel_bytes = ptrdiff_t{tile_n_padded(args.n1 - args.n0)} * kPanelColumns * 4;
  std::byte* c = reinterpret_cast<std::byte*>(args.c);
  std::byte* c0 = c + p * panel_bytes + (n - args.n0) * stride0;
  std::byte* c1 = c + (p + 1) * panel_bytes + (n - args.n0) * stride1;
  if (zero_first) {
    Tile::zero<0>();
    if constexpr (kPanels == 2) Tile::zero<1>();
    if constexpr (kWeights == 2) Tile::zero<2>();
    if constexpr (kWeights == 2 && kPanels == 2) Tile::zero<3>();
  } else {
    Tile::load<0>(c0, stride0);
    if constexpr (kPanels == 2) Tile::load<1>(c1, stride1);
    if constexpr (kWeights == 2) Tile::load<2>(c0 + kTileRows * stride0, stride0);
    if constexpr (kWeights == 2 && kPanels == 2) Tile::load<3>(c1 + kTileRows * stride1, stride1);
  }

  const std::byte* b0 = args.x.data + p * args.x.stride_bytes + w.step0 * kTileRows * stride0;
  const std::byte* b1 = args.x.data + (p + 1) * args.x.stride_bytes + w.step0 * kTileRows * stride1;
  const std::byte* a = w.data;
  [[maybe_unused]] std::byte* left = args.scratch;
  for (size_t s = 0; s < w.steps; ++s) {
    if constexpr (kWeights == 1 && kPanels == 1 && kFrom == Weights::kPassing) prefetch_rows(w, s);
    Tile::load<6>(b0, stride0);
    load_weights<kFrom, 4>(a, w.row_stride);
    Product::template dot<0, 4, 6>();
    if constexpr (kPanels == 2) {
      Tile::load<7>(b1, stride1);
      Product::template dot<1, 4, 7>();
    }
    if constexpr (kWeights == 2) {
      load_weights<kFrom, 5>(a + w.second_tile, w.row_stride);
      Product::template dot<2, 5, 6>();
    }
    if constexpr (kWeights == 2 && kPanels == 2) Product::template dot<3, 5, 7>();
    if constexpr (kFrom == Weights::kLeftInScratch) {
      Tile::store<4>(left, kTileK * sizeof(bf16));
      if constexpr (kWeights == 2) Tile::store<5>(left + kTileBytes, kTileK * sizeof(bf16));
      left += kWeights * kTileBytes;
    }
    a += w.step_bytes;
    b0 += kTileRows * stride0;
    b1 += kTileRows * stride1;
  }

  Tile::store<0>(c0, stride0);
  if constexpr (kPanels == 2) Tile::store<1>(c1, stride1);
  if constexpr (kWeights == 2) Tile::store<2>(c0 + kTileRows * stride0, stride0);
  if constexpr (kWeights == 2 && kPanels == 2) Tile::store<3>(c1 + kTileRows * stride1, stride1);
}

// A block of K against panels [begin, end).
template <class Product, int kWeights, Weights kFrom>
void tile_panels(const NtArgs& args, TileScope& scope, const TileBlock& w, uint32_t begin, uint32_t end,
                 uint32_t n, bool zero_first) {
  for (uint32_t p = begin; p < end; p += 2) {
    if (p + 1 < end) {
      scope.use(kPanelColumns, panel_width(args.x, p + 1));
      tile_block<Product, kWeights, 2, kFrom>(args, w, p, n, zero_first);
    } else {
      scope.use(panel_width(args.x, p), 0);
      tile_block<Product, kWeights, 1, kFrom>(args, w, p, n, zero_first);
    }
  }
}

// Brings elements [k0, k1) of `rows` weight rows to tiles in scratch, zeros around them.
template <class Format, class Product, int kWeights>
void fill_tile_block(const WeightView& w, uint32_t n, uint32_t rows, size_t k0, size_t k1, std::byte* tiles) {
  constexpr size_t kRowBytes = kTileK * sizeof(bf16), kStepBytes = kWeights * kTileBytes;
  constexpr size_t kSegmentBytes = kRowBytes * Product::kSegment / Product::kStep;
  for (uint32_t r = 0; r < kWeights * kTileRows; ++r) {
    std::byte* to = tiles + r * kRowBytes;
    const typename Unpack<Format>::Row row(w, n + (r < rows ? r : 0));
    for (size_t k = k0; k < k1; k += Product::kStep, to += kStepBytes) {
      for (uint32_t i = 0; i < Product::kStep / Product::kSegment; ++i) {
        const size_t at = k + i * Product::kSegment, left = at < k1 ? k1 - at : 0;
        if (r >= rows || left == 0) {
          std::memset(to + i * kSegmentBytes, 0, kSegmentBytes);
        } else if (left < Product::kSegment) {
          Product::store_tail(to + i * kSegmentBytes, row, at, left);
        } else {
          Product::store(to + i * kSegmentBytes, row, at);
        }
      }
    }
  }
}

// Of weight rows [n, n + rows), all of whose K is done: whole numbers become fp32, and scales are applied.
template <class Format, class Product>
void finish_tile_rows(const NtArgs& args, uint32_t n, uint32_t rows) {
  const uint32_t n_padded = tile_n_padded(args.n1 - args.n0);
  for (uint32_t m = 0; m < args.x.rows; m += kPanelColumns) {
    const uint32_t width = panel_width(args.x, m / kPanelColumns);
    float* c = args.c + size_t{m} * n_padded + (n - args.n0) * width;
    float scale[kPanelColumns];
    for (uint32_t i = 0; i < width; ++i)
      scale[i] = Product::kIsInteger ? args.x.quantized[m + i].scale : 1.0f;
    for (uint32_t r = 0; r < rows; ++r, c += width) {
      const float row_scale = args.w.row_scale[n + r];
      for (uint32_t i = 0; i < width; ++i) {
        if constexpr (Product::kIsInteger) {
          c[i] = row_scale * (static_cast<float>(std::bit_cast<int32_t>(c[i])) * scale[i]);
        } else {
          c[i] *= row_scale;
        }
      }
    }
  }
}

// Weight rows [n, n + rows), at most kWeights tiles of them.
template <class Format, class Product, int kWeights>
void nt_tile_group(const NtArgs& args, TileScope& scope, uint32_t n, uint32_t rows) {
  constexpr size_t kStep = Product::kStep;
  const uint32_t k = args.x.k, panels = static_cast<uint32_t>(div_up(args.x.rows, kPanelColumns));
  const bool whole_tiles = Product::template as_stored<Format>() && rows == kWeights * kTileRows;
  const auto in_place = [&](size_t k0, size_t k1) {
    return TileBlock::in_place(args.w.row(n) + Format::row_bytes(k0), args.w.row_stride_bytes, k0 / kStep,
                               (k1 - k0) / kStep);
  };
  const auto in_scratch = [&](size_t k0, size_t k1) {
    return TileBlock::in_scratch<kWeights>(args.scratch, k0 / kStep, div_up(k1 - k0, kStep));
  };
  bool zero_first = !args.accumulate;
  size_t k0 = 0;
  if (whole_tiles && k >= kStep && args.x.rows <= kInPlaceRows) {
    k0 = k / kStep * kStep;
    tile_panels<Product, kWeights, Weights::kPassing>(args, scope, in_place(0, k0), 0, panels, n, zero_first);
    zero_first = false;
  }
  while (k0 < k) {
    size_t k1 = k0 + kTileBlockSteps * kStep < k ? k0 + kTileBlockSteps * kStep : k;
    uint32_t begin = 0;  // the first panel that reads scratch
    if (whole_tiles && k1 - k0 >= kStep) {
      k1 = k0 + (k1 - k0) / kStep * kStep;
      begin = panels < 2 ? panels : 2;
      tile_panels<Product, kWeights, Weights::kLeftInScratch>(args, scope, in_place(k0, k1), 0, begin, n,
                                                              zero_first);
    } else {
      fill_tile_block<Format, Product, kWeights>(args.w, n, rows, k0, k1, args.scratch);
    }
    tile_panels<Product, kWeights, Weights::kFromScratch>(args, scope, in_scratch(k0, k1), begin, panels, n,
                                                          zero_first);
    zero_first = false;
    k0 = k1;
  }
  if constexpr (Format::kHasRowScale) finish_tile_rows<Format, Product>(args, n, rows);
}

template <class Format, class Product>
void nt_tiles(const NtArgs& args) {
  TileScope scope;
  // A single panel takes its weights 16 rows at a time: memory serves 16 streams better than 32.
  const uint32_t group = args.x.rows <= kPanelColumns ? kTileRows : kGroupRows;
  for (uint32_t n = args.n0; n < args.n1; n += group) {
    const uint32_t rows = args.n1 - n < group ? args.n1 - n : group;
    if (rows > kTileRows) {
      nt_tile_group<Format, Product, 2>(args, scope, n, rows);
    } else {
      nt_tile_group<Format, Product, 1>(args, scope, n, rows);
    }
  }
}
