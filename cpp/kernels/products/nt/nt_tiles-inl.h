// NT on the tile unit: C^T[n, m] (+)= sum_k W[n, k] X[m, k].
//
// The weights are the A operand, 16 rows x 64 bytes straight from the row-major matrix; the activations are
// the K-paired B operand. A step is two weight tiles by two activation panels. The product is
// transposed, which after the activation function is the K-paired operand of the down projection.
//
// C stays in the tiles for up to kTileBlockSteps steps of K. With few activations the weights are multiplied
// in place (then memory is the limit). With many, the first pair of panels multiplies them in place and
// copies them to scratch, tile by tile, for the other panels. Rows that have to be decoded or end
// inside a tile are written to scratch by the first pair of panels, some steps before it multiplies them:
// tiles cannot be loaded from stores still in flight, and vectors and tiles work at the same
// time. Between blocks of K sums are kept in C, so the order along K does not change.
//
// With many rows a block of K is finished for all outputs of the call before the next one begins: the
// activations of the block stay in L2.
//
// The entry nt_tiles and the variants for few rows are in nt_decoded_tile-inl.h.
//
// A Product defines the operands: bf16 pairs into fp32, or int8 quads into int32, converted to fp32
// after all of K. The bytes of tiles, panels and blocks are the same for both; a step is 64
// bytes of a row of the operand.
//
// panels-inl.h defines the layout of panels and C blocks. Included inside a target's namespace, after it.

// Steps of K in a block: many, since storing and loading C costs as much as two steps, but 32 rows of it (128
// KiB) and the activations must stay in the L2 cache.
inline constexpr uint32_t kTileBlockSteps = 64;
// The number of steps in scratch when no other panel reads them.
inline constexpr size_t kMostRingSteps = 16;
// Up to this many activation rows weights are multiplied in place.
inline constexpr uint32_t kInPlaceRows = 128;

inline size_t nt_scratch_bytes_tiles(uint32_t k) {
  const size_t steps = div_up(k, kTileK);
  return (steps < kTileBlockSteps ? round_up(steps, kMostRingSteps) : kTileBlockSteps) * 2 * kTileBytes;
}

struct TileBf16 {
  static constexpr uint32_t kStep = kTileK, kSegment = Vec::kStep;
  static constexpr bool kIsInteger = false;
  template <class Format>
  static constexpr bool as_stored() {
    return Unpack<Format>::kUsedAsStored;
  }
  template <int kC, int kA, int kB>
  static KT_INLINE void dot() {
    Tile::dot_bf16<kC, kA, kB>();
  }
  static KT_INLINE float sum(float c) { return c; }
  static KT_INLINE Float sums(const float* c) { return Vec::load_f(c); }
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
    return Unpack<Format>::kBytesUsedAsStored;
  }
  template <int kC, int kA, int kB>
  static KT_INLINE void dot() {
    Tile::dot_int8<kC, kA, kB>();
  }
  static KT_INLINE float sum(float c) { return static_cast<float>(std::bit_cast<int32_t>(c)); }
  static KT_INLINE Float sums(const float* c) { return Vec::load_ints(c); }
  template <class Row>
  static KT_INLINE void store(std::byte* to, const Row& row, size_t k) {
    Vec::store_bytes(to, row.bytes(k));
  }
  template <class Row>
  static KT_INLINE void store_tail(std::byte* to, const Row& row, size_t k, size_t count) {
    Vec::store_bytes(to, row.bytes_tail(k, count));
  }
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

// Where a block's weights are read from, and whether they are copied to scratch.
enum class Weights { kInPlace, kKeptInScratch, kFromScratch, kDecoded };

// No weights have to be decoded to scratch.
struct NothingToDecode {
  KT_INLINE void operator()(size_t) const {}
};

template <Weights kFrom, int kTile>
KT_INLINE void load_weights(const std::byte* tile, ptrdiff_t row_stride) {
  if constexpr (kFrom == Weights::kFromScratch) {
    Tile::load_past_l1<kTile>(tile, row_stride);
  } else {
    Tile::load<kTile>(tile, row_stride);
  }
}

// The weights of the next group, prefetched a few cache lines per step while this one is multiplied: bytes
// [begin, end) of each of its rows.
class RowPrefetch {
 public:
  KT_INLINE RowPrefetch(const WeightView& w, uint32_t n, uint32_t rows, size_t begin, size_t end,
                        size_t steps)
      : next_(w.row(n) + begin), left_(div_up(end - begin, kCacheLine)), more_rows_(rows - 1) {
    each_ = div_up(left_ * rows, steps ? steps : 1);
    if (w.row_stride_bytes == static_cast<ptrdiff_t>(end - begin)) {  // the rows adjoin: one long row
      left_ = rows * (end - begin) / kCacheLine, more_rows_ = 0;
    }
    lines_ = left_;
    to_next_row_ = w.row_stride_bytes - static_cast<ptrdiff_t>(lines_ * kCacheLine);
  }
  KT_INLINE void prefetch() {
    const size_t some = each_ < left_ ? each_ : left_;
    for (size_t i = 0; i < some; ++i, next_ += kCacheLine) __builtin_prefetch(next_, 0, 2);
    left_ -= some;
    if (left_ == 0 && more_rows_ > 0) --more_rows_, left_ = lines_, next_ += to_next_row_;
  }

 private:
  const std::byte* next_;
  size_t left_, more_rows_;  // lines of this row, rows behind it
  size_t each_, lines_;
  ptrdiff_t to_next_row_;
};

// A single panel waits for memory alone: rows are prefetched some steps ahead, at their end those behind
// them.
KT_INLINE void prefetch_rows(const TileBlock& w, size_t step) {
  constexpr size_t kAhead = 8;
  const size_t at = step + kAhead;
  const std::byte* row =
      at < w.steps ? w.data + at * kCacheLine : w.data + w.second_tile + (at - w.steps) * kCacheLine;
  for (uint32_t r = 0; r < kTileRows; ++r, row += w.row_stride) __builtin_prefetch(row, 0, 3);
}

// A step of a tile of rows, decoded. `line`: offset within each row of the cache line to prefetch; -1: none.
// A format may specialize this where decoding several rows at once pays.
template <class Format, class Product>
KT_INLINE void decode_tile(WeightView rest, size_t k, std::byte* to, ptrdiff_t line) {
  if constexpr (requires { Unpack<Format>::decode_tile(rest, k, to, line); }) {
    Unpack<Format>::decode_tile(rest, k, to, line);
  } else {
    constexpr size_t kSegments = Product::kStep / Product::kSegment, kRowBytes = kTileK * sizeof(bf16);
    for (uint32_t r = 0; r < kTileRows; ++r, to += kRowBytes, rest.next_row()) {
      const typename Unpack<Format>::Row row(rest, 0);
      if (line >= 0) __builtin_prefetch(rest.data + line, 0, 2);
      KT_UNROLL for (size_t i = 0; i < kSegments; ++i)
          Product::store(to + i * kRowBytes / kSegments, row, k + i * Product::kSegment);
    }
  }
}

// Decodes the weights of a group of rows to tiles in scratch, padded with zeros. Scratch is a ring of `ring`
// steps, a power of two larger than the steps decoded at a time.
template <class Format, class Product, int kWeights>
struct DecodeToScratch {
  static constexpr size_t kRingSteps = 4;
  static constexpr size_t kRowBytes = kTileK * sizeof(bf16), kStepBytes = kWeights * kTileBytes;
  static constexpr size_t kSegmentBytes = kRowBytes * Product::kSegment / Product::kStep;
  static constexpr size_t kSteps = 2;  // at a time: a cache line of 4-bit numbers
  const WeightView& w;
  uint32_t n, rows;
  size_t k0, k1;
  std::byte* scratch;
  size_t ring;

  // Called before each step, from the first on.
  KT_INLINE void operator()(size_t step) const {
    if (step == 0) decode(0);
    if (step % kSteps == 0) decode(step + kSteps);
  }

 private:
  KT_INLINE void decode(size_t step) const {
    const size_t k = k0 + step * Product::kStep;
    if (k >= k1) return;
    std::byte* to = scratch + (step & (ring - 1)) * kStepBytes;
    if (rows == kWeights * kTileRows && k + kSteps * Product::kStep <= k1) {
      decode_whole(k, to);
    } else {
      decode_rest(k, to);
    }
  }
  // Not inlined: the same code for any number of panels.
  __attribute__((noinline)) void decode_whole(size_t k, std::byte* to) const {
    for (uint32_t tile = 0; tile < kWeights; ++tile) {
      for (size_t step = 0; step < kSteps; ++step)
        decode_tile<Format, Product>(w.from(n + tile * kTileRows), k + step * Product::kStep,
                                     to + step * kStepBytes + tile * kTileBytes, -1);
    }
  }
  void decode_rest(size_t k, std::byte* to) const {
    for (uint32_t r = 0; r < kWeights * kTileRows; ++r, to += kRowBytes) {
      const typename Unpack<Format>::Row row(w, n + (r < rows ? r : 0));
      for (size_t s = 0; s < kSteps && k + s * Product::kStep < k1; ++s) {
        for (size_t i = 0; i < Product::kStep / Product::kSegment; ++i) {
          const size_t at = k + s * Product::kStep + i * Product::kSegment, left = at < k1 ? k1 - at : 0;
          std::byte* segment = to + s * kStepBytes + i * kSegmentBytes;
          if (r >= rows || left == 0) {
            std::memset(segment, 0, kSegmentBytes);
          } else if (left < Product::kSegment) {
            Product::store_tail(segment, row, at, left);
          } else {
            Product::store(segment, row, at);
          }
        }
      }
    }
  }
};

// A step of a panel, to L1.
KT_INLINE void prefetch_step(const std::byte* panel) {
  KT_UNROLL for (size_t i = 0; i < kTileRows; ++i) __builtin_prefetch(panel + i * kCacheLine, 0, 3);
}

// One block, of one or two tiles of weight rows, against panels p and, when kPanels is 2, p + 1. Scratch,
// which no other panel needs soon, is loaded past the L1 cache; activations are not (Emerald Rapids:
// 5 %).
template <class Product, int kWeights, int kPanels, Weights kFrom, class Decode>
KT_INLINE void tile_block(const NtArgs& args, const TileBlock& w, uint32_t p, uint32_t n, bool zero_first,
                          const Decode& decode, RowPrefetch& ahead) {
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
  [[maybe_unused]] std::byte* kept = args.scratch;
  for (size_t s = 0; s < w.steps; ++s) {
    if constexpr (kWeights == 1 && kPanels == 1 && kFrom == Weights::kInPlace) {
      prefetch_rows(w, s);
    } else {
      ahead.prefetch();
    }
    // More panels than the L1 cache has room for: those of a step come from L2.
    if constexpr (kPanels == 2 && kFrom == Weights::kFromScratch)
      prefetch_step(b0 + 2 * kTileRows * stride0), prefetch_step(b1 + 2 * kTileRows * stride1);
    if constexpr (kFrom == Weights::kDecoded) {
      decode(s);
      a = w.data + (s & (decode.ring - 1)) * w.step_bytes;
    }
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
    if constexpr (kFrom == Weights::kKeptInScratch) {
      Tile::store<4>(kept, kTileK * sizeof(bf16));
      if constexpr (kWeights == 2) Tile::store<5>(kept + kTileBytes, kTileK * sizeof(bf16));
      kept += kWeights * kTileBytes;
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

// Rows [n, n + rows) of a panel whose sums are complete: whole numbers become fp32, and scales are applied.
template <class Product>
KT_INLINE void finish_panel(const NtArgs& args, uint32_t p, uint32_t n, uint32_t rows) {
  const uint32_t width = panel_width(args.x, p), m = p * kPanelColumns;
  float* c = args.c + size_t{m} * tile_n_padded(args.n1 - args.n0) + (n - args.n0) * width;
  float scale[kPanelColumns];
  for (uint32_t i = 0; i < width; ++i)
    scale[i] = Product::kIsInteger ? args.x.quantized_row(m + i).scale : 1.0f;
  for (uint32_t r = 0; r < rows; ++r, c += width) {
    const float channel_scale = args.w.channel_scale[n + r];
    if (width < kPanelColumns) {
      for (uint32_t i = 0; i < width; ++i) c[i] = channel_scale * (Product::sum(c[i]) * scale[i]);
    } else {
      for (uint32_t i = 0; i < kPanelColumns; i += Vec::kWidth) {
        const Float scaled = Vec::mul(Product::sums(c + i), Vec::load_f(scale + i));
        Vec::store_f(c + i, Vec::mul(Vec::set(channel_scale), scaled));
      }
    }
  }
}

// The operand of a group of weight rows and its end; the blocks of K follow one another.
struct TileGroup {
  const NtArgs& args;
  TileScope& scope;
  uint32_t n, rows;
  RowPrefetch ahead;
  bool zero_first, is_last;  // of this block

  // A block of K against panels [begin, end).
  template <class Product, int kWeights, Weights kFrom, class Decode = NothingToDecode>
  void multiply(const TileBlock& w, uint32_t begin, uint32_t end, const Decode& decode = {}) {
    for (uint32_t p = begin; p < end; p += 2) {
      if (p + 1 < end) {
        scope.use(kPanelColumns, panel_width(args.x, p + 1));
        tile_block<Product, kWeights, 2, kFrom>(args, w, p, n, zero_first, decode, ahead);
      } else {
        scope.use(panel_width(args.x, p), 0);
        tile_block<Product, kWeights, 1, kFrom>(args, w, p, n, zero_first, decode, ahead);
      }
      if (!is_last || args.w.channel_scale == nullptr) continue;
      for (uint32_t done = p; done < end && done < p + 2; ++done) finish_panel<Product>(args, done, n, rows);
    }
  }
};

// Columns [begin, end) of weights.
struct SpanOfK {
  size_t begin, end;
  // As many behind them, of k in all.
  SpanOfK after(size_t k) const {
    const size_t size = end - begin;
    return {end, k - end < size ? k : end + size};
  }
};

// The group of weight rows that is multiplied next.
struct NextGroup {
  uint32_t n;
  SpanOfK span;
};

// Weight rows [n, n + rows), at most kWeights tiles of them, and columns `span`.
template <class Format, class Product, int kWeights>
void nt_tile_group(const NtArgs& args, TileScope& scope, uint32_t n, uint32_t rows, SpanOfK span,
                   NextGroup next) {
  constexpr size_t kStep = Product::kStep;
  const uint32_t k = args.x.k, panels = static_cast<uint32_t>(div_up(args.x.rows, kPanelColumns));
  const uint32_t first = panels < 2 ? panels : 2;  // panels that meet the weights first
  const bool whole_tiles = Product::template as_stored<Format>() && rows == kWeights * kTileRows;
  const auto bytes = [&](size_t columns) { return format_row_bytes(args.w.format, columns); };
  const RowPrefetch ahead(args.w, next.n, kWeights * kTileRows, bytes(next.span.begin), bytes(next.span.end),
                          div_up(span.end - span.begin, kStep) * div_up(panels, 2));
  TileGroup group{args, scope, n, rows, ahead, !args.accumulate && span.begin == 0, false};
  const auto in_place = [&](size_t k0, size_t k1) {
    return TileBlock::in_place(args.w.row(n) + Format::row_bytes(k0), args.w.row_stride_bytes, k0 / kStep,
                               (k1 - k0) / kStep);
  };
  const auto in_scratch = [&](size_t k0, size_t k1) {
    return TileBlock::in_scratch<kWeights>(args.scratch, k0 / kStep, div_up(k1 - k0, kStep));
  };
  size_t k0 = span.begin;
  if (whole_tiles && k >= kStep && args.x.rows <= kInPlaceRows) {  // and all of K is taken
    k0 = k / kStep * kStep;
    group.is_last = k0 == k;
    group.multiply<Product, kWeights, Weights::kInPlace>(in_place(0, k0), 0, panels);
    group.zero_first = false;
  }
  while (k0 < span.end) {
    // Tiles that no other panel reads stay in scratch only briefly.
    const bool is_shared = panels > first;
    size_t k1 = k0 + kTileBlockSteps * kStep < span.end ? k0 + kTileBlockSteps * kStep : span.end;
    if (whole_tiles && k1 - k0 >= kStep) {
      k1 = k0 + (k1 - k0) / kStep * kStep;
      group.is_last = k1 == k;
      group.multiply<Product, kWeights, Weights::kKeptInScratch>(in_place(k0, k1), 0, first);
    } else {
      if (!is_shared) k1 = span.end;
      group.is_last = k1 == k;
      using Decode = DecodeToScratch<Format, Product, kWeights>;
      const Decode decode{
          args.w, n, rows, k0, k1, args.scratch, is_shared ? kTileBlockSteps : Decode::kRingSteps};
      group.multiply<Product, kWeights, Weights::kDecoded>(in_scratch(k0, k1), 0, first, decode);
    }
    group.multiply<Product, kWeights, Weights::kFromScratch>(in_scratch(k0, k1), first, panels);
    group.zero_first = false;
    k0 = k1;
  }
}
