// NT on the tile unit by weights in blocks: what nt_tiles.h and nt_decoded_tile.h do for other formats a
// segment at a time, here a run of a row at a time. Included inside a target's namespace, after them.

// Steps of a run: at least a block.
inline constexpr size_t kRunSteps = kBlockElements / kTileK;
static_assert(kRunElements == kTileK && 2 * kRunSteps <= kMostRingSteps);

// A run of a row, to tiles that are `stride` apart; zeros fill the last one.
KT_INLINE void unpack_to_tiles(const WeightView& w, uint32_t n, size_t k0, size_t k1, std::byte* to,
                               ptrdiff_t stride) {
  if ((k1 - k0) % kTileK != 0)
    std::memset(to + static_cast<ptrdiff_t>((k1 - k0) / kTileK) * stride, 0, kTileK * sizeof(bf16));
  AnyBlocks::unpack(w, n, k0, k1, to, stride);
}

// While a run of steps is multiplied, the next is brought, a few rows a step.
template <class Product, int kWeights>
struct BringToScratch<AnyBlocks, Product, kWeights> {
  static constexpr size_t kRingSteps = 2 * kRunSteps;
  static constexpr size_t kRowBytes = kTileK * sizeof(bf16), kStepBytes = kWeights * kTileBytes;
  static constexpr uint32_t kRows = kWeights * kTileRows, kRowsAStep = kRows / kRunSteps;
  const WeightView& w;
  uint32_t n, rows;
  size_t k0, k1;
  std::byte* scratch;
  size_t ring;

  // Called before each step, from the first on.
  KT_INLINE void operator()(size_t step) const {
    const size_t within = step % kRunSteps;
    if (step == 0) bring(0, 0, kRows);
    const auto first = static_cast<uint32_t>(within * kRowsAStep);
    bring(step - within + kRunSteps, first, first + kRowsAStep);
  }

 private:
  void bring(size_t step, uint32_t r, uint32_t end) const {
    const size_t k = k0 + step * kTileK;
    if (k >= k1) return;
    const size_t last = k + kBlockElements < k1 ? k + kBlockElements : k1;
    std::byte* to = scratch + (step & (ring - 1)) * kStepBytes + r * kRowBytes;
    for (; r < end; ++r, to += kRowBytes) {
      if (r < rows) {
        unpack_to_tiles(w, n + r, k, last, to, kStepBytes);
      } else {
        for (size_t i = 0; i < div_up(last - k, size_t{kTileK}); ++i)
          std::memset(to + i * kStepBytes, 0, kRowBytes);
      }
    }
  }
};

template <class Product>
class DecodedTile<AnyBlocks, Product> {
 public:
  static KT_INLINE bool takes(const NtArgs& args, uint32_t rows) {
    return args.x.rows <= kPanelColumns && rows == kTileRows && args.x.k % kTileK == 0 && args.x.k > 0;
  }
  KT_INLINE DecodedTile(const NtArgs& args, uint32_t n) : args_(args), n_(n) {}

  KT_INLINE void multiply(const std::byte* x, ptrdiff_t x_stride) {
    bring(0, 0, kTileRows);
    for (size_t step = 0; step < args_.x.k / kTileK; ++step, x += kTileRows * x_stride) {
      const auto first = static_cast<uint32_t>(step % kRunSteps * kRowsAStep);
      bring((step / kRunSteps + 1) * kRunSteps, first, first + kRowsAStep);
      Tile::load<6>(x, x_stride);
      Tile::load<4>(tile(step), kRowBytes);
      Product::template dot<0, 4, 6>();
    }
  }

 private:
  static constexpr ptrdiff_t kRowBytes = kTileK * sizeof(bf16);
  static constexpr uint32_t kRowsAStep = kTileRows / kRunSteps;

  KT_INLINE std::byte* tile(size_t step) const { return args_.scratch + step % (2 * kRunSteps) * kTileBytes; }
  // The run that begins with a step, of rows [r, end); and the same of the rows a group behind is asked for.
  KT_INLINE void bring(size_t step, uint32_t r, uint32_t end) const {
    const size_t k = step * kTileK;
    if (k >= args_.x.k) return;
    const size_t last = k + kBlockElements < args_.x.k ? k + kBlockElements : args_.x.k;
    const size_t begin_bytes = format_row_bytes(args_.w.format, k),
                 bytes = format_row_bytes(args_.w.format, last) - begin_bytes;
    for (; r < end; ++r) {
      prefetch_lines(args_.w.row(n_ + kTileRows + r) + begin_bytes, bytes);
      AnyBlocks::unpack(args_.w, n_ + r, k, last, tile(step) + r * kRowBytes, kTileBytes);
    }
  }
  static KT_INLINE void prefetch_lines(const std::byte* data, size_t bytes) {
    for (size_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(data + i, 0, 2);
  }

  const NtArgs& args_;
  const uint32_t n_;
};
