// NT on the tile unit for up to 16 rows of activations with decoded weights: decoding and memory are the
// bottleneck. Included inside a target's namespace, after nt_tiles-inl.h.

// Decodes steps of a tile of rows, which follow one another, and prefetches a line of each row
// (decode_tile in nt_tiles-inl.h). A format may keep state from step to step.
template <class Format, class Product>
struct TileDecoder {
  KT_INLINE void decode(const WeightView& rows, size_t step, std::byte* to, ptrdiff_t line) {
    decode_tile<Format, Product>(rows, step * Product::kStep, to, line);
  }
};

// A single panel of activations and a tile of decoded weight rows, K whole steps: the general algorithm
// without its special cases. A step is decoded while the previous one is multiplied, so that vectors, tiles
// and memory work at once; decoding further ahead, or several at a time, is slower. The rows of the next
// group are prefetched one line of each at a time: memory serves many streams faster than one row after the
// other.
template <class Format, class Product>
class DecodedTile {
 public:
  static KT_INLINE bool takes(const NtArgs& args, uint32_t rows) {
    return args.x.rows <= kPanelColumns && rows == kTileRows && args.x.k % Product::kStep == 0 &&
           args.x.k > 0;
  }

  KT_INLINE DecodedTile(const NtArgs& args, uint32_t n)
      : rows_(args.w.from(n)),
        steps_(args.x.k / Product::kStep),
        step_bytes_(div_up(format_row_bytes(args.w.format, args.x.k), args.x.k / Product::kStep)),
        ring_(args.scratch) {}

  KT_INLINE void multiply(const std::byte* x, ptrdiff_t x_stride) {
    decode(0);
    for (size_t step = 0; step < steps_; ++step, x += kTileRows * x_stride) {
      if (step + 1 < steps_) decode(step + 1);
      Tile::load<6>(x, x_stride);
      Tile::load<4>(tile(step), kRowBytes);
      Product::template dot<0, 4, 6>();
    }
  }

 private:
  static constexpr size_t kRowBytes = kTileK * sizeof(bf16);

  KT_INLINE std::byte* tile(size_t step) const { return ring_ + step % 2 * kTileBytes; }
  KT_INLINE void decode(size_t step) { decoder_.decode(rows_, step, tile(step), prefetched_line(step)); }
  // A step's line, in bytes from the beginning of a row to that of the row a group behind; -1: none.
  KT_INLINE ptrdiff_t prefetched_line(size_t step) const {
    const size_t at = step * step_bytes_;
    if (at / kCacheLine == (at + step_bytes_) / kCacheLine) return -1;
    return kTileRows * rows_.row_stride_bytes + static_cast<ptrdiff_t>(at);
  }

  const WeightView rows_;
  const size_t steps_, step_bytes_;
  std::byte* const ring_;
  TileDecoder<Format, Product> decoder_;
};

template <class Format, class Product>
void nt_decoded_tile(const NtArgs& args, TileScope& scope, uint32_t n) {
  const ptrdiff_t stride = args.x.rows * sizeof(float);
  std::byte* c = reinterpret_cast<std::byte*>(args.c) + (n - args.n0) * stride;
  scope.use(args.x.rows, 0);
  if (args.accumulate) {
    Tile::load<0>(c, stride);
  } else {
    Tile::zero<0>();
  }
  DecodedTile<Format, Product>(args, n).multiply(args.x.data, stride);
  Tile::store<0>(c, stride);
  if (args.w.channel_scale) finish_panel<Product>(args, 0, n, kTileRows);
}

// A single row of activations in place, with results in place: decoded weights go directly into products on
// vectors, which approach the speed of memory, while the way through scratch does not (Emerald Rapids: one
// token of a layer takes 0.19 ms instead of 0.3). Integer sums are exact, so the bits are the same.
template <class Format>
void nt_single_row(NtArgs args) {
  static_assert(kPackedWeightsBytes + Vec::kRowTile * sizeof(Vec::Acc) <= kTileBlockSteps * 2 * kTileBytes,
                "rows of several blocks leave their lanes in the scratch of tiles");
  const QuantizedRow& quantized = args.x.quantized_row(0);
  args.x = {args.x.data, 0, nullptr, 1, args.x.k, &quantized};
  nt_rows<Format, Int8Product>(args);
}

// Columns `span` of all groups of outputs: whole groups by nt_tile_group, few rows by the ways above.
template <class Format, class Product>
void nt_tile_groups(const NtArgs& args, TileScope& scope, SpanOfK span) {
  using Loop = LoopFormat<Format>;
  const size_t k = args.x.k;
  // A single panel takes its weights 16 rows at a time: memory serves 16 streams better than 32.
  const uint32_t group = args.x.rows <= kPanelColumns ? kTileRows : kGroupRows;
  for (uint32_t n = args.n0; n < args.n1; n += group) {
    const uint32_t rows = args.n1 - n < group ? args.n1 - n : group;
    if constexpr (!Product::template as_stored<Loop>() && !std::is_same_v<Format, AnyBlockFormat>) {
      if (DecodedTile<Format, Product>::takes(args, rows)) {
        nt_decoded_tile<Format, Product>(args, scope, n);
        continue;
      }
    }
    // Behind the last group comes the first one with the next columns, or that of another call.
    const bool wraps = n + group >= args.n1 && span.end < k;
    const NextGroup next{wraps ? args.n0 : n + group, wraps ? span.after(k) : span};
    if (rows > kTileRows) {
      nt_tile_group<Loop, Product, 2>(args, scope, n, rows, span, next);
    } else {
      nt_tile_group<Loop, Product, 1>(args, scope, n, rows, span, next);
    }
  }
}

// The product. With many rows by blocks of K, whose activations then stay in L2 for all outputs.
template <class Format, class Product>
void nt_tiles(const NtArgs& args) {
  using Loop = LoopFormat<Format>;
  if constexpr (Product::kIsInteger && !Product::template as_stored<Loop>()) {
    if (args.x.rows == 1) return nt_single_row<Format>(args);
  }
  TileScope scope;
  const size_t k = args.x.k, block = args.x.rows > kInPlaceRows ? kTileBlockSteps * Product::kStep : k;
  SpanOfK span{0, block < k ? block : k};
  nt_tile_groups<Format, Product>(args, scope, span);
  while (span.end < k) {
    span = span.after(k);
    nt_tile_groups<Format, Product>(args, scope, span);
  }
}
