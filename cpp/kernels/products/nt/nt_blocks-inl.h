// NT on the tile unit with weights in blocks: like nt_tiles-inl.h and nt_decoded_tile-inl.h, but a run of a
// row at a time instead of a segment. Included inside a target's namespace, after them.

// Steps of a run: at least one block.
inline constexpr size_t kRunSteps = kBlockElements / kTileK;
static_assert(kRunElements == kTileK && 2 * kRunSteps <= kMostRingSteps);

// A run of a row, to tiles that are `stride` apart; zeros fill the last one.
KT_INLINE void unpack_to_tiles(const WeightView& w, uint32_t n, size_t k0, size_t k1, std::byte* to,
                               ptrdiff_t stride) {
  if ((k1 - k0) % kTileK != 0)
    std::memset(to + static_cast<ptrdiff_t>((k1 - k0) / kTileK) * stride, 0, kTileK * sizeof(bf16));
  AnyBlockFormat::unpack(w, n, k0, k1, to, stride);
}

// While a run of steps is multiplied, the next is decoded, a few rows per step.
template <class Product, int kWeights>
struct DecodeToScratch<AnyBlockFormat, Product, kWeights> {
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
    if (step == 0) decode(0, 0, kRows);
    const auto first = static_cast<uint32_t>(within * kRowsAStep);
    decode(step - within + kRunSteps, first, first + kRowsAStep);
  }

 private:
  void decode(size_t step, uint32_t r, uint32_t end) const {
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

// A block's scales serve the steps of its groups.
template <BlockFormat Format, class Product>
struct TileDecoder<Format, Product> {
  static constexpr size_t kBlockSteps = Format::kBlock / kTileK;  // 1, 2, 4 or 8

  KT_INLINE void decode(const WeightView& rows, size_t step, std::byte* to, ptrdiff_t line) {
    const size_t g = step % kBlockSteps, at = step / kBlockSteps * Format::kBlockBytes;
    const std::byte* row = rows.data;
    RunWriter out(to, kTileK * sizeof(bf16));
    for (uint32_t r = 0; r < kTileRows; ++r, row += rows.row_stride_bytes) {
      if (line >= 0) __builtin_prefetch(row + line, 0, 2);
      auto& scales = scales_[kBlockSteps == 1 ? 0 : r];
      // Here, and not for all rows before: gcc 12 would make vectors of that loop, and read behind the last
      // row.
      if (g == 0) open_block<Format>(row + at, scales);
      store_group<Format>(row + at, scales, g, out);
    }
  }

 private:
  typename Format::Scales scales_[kBlockSteps == 1 ? 1 : kTileRows];
};

// A step of float32 is two lines of a row.
template <PlainFormat Format, class Product>
struct TileDecoder<Format, Product> {
  KT_INLINE void decode(const WeightView& rows, size_t step, std::byte* to, ptrdiff_t line) {
    const size_t at = Format::row_bytes(step * kTileK);
    const std::byte* row = rows.data;
    RunWriter out(to, kTileK * sizeof(bf16));
    for (uint32_t r = 0; r < kTileRows; ++r, row += rows.row_stride_bytes) {
      if (line >= 0) {
        for (size_t i = 0; i < Format::row_bytes(kTileK); i += kCacheLine)
          __builtin_prefetch(row + line + i, 0, 2);
      }
      for (size_t i = 0; i < kTileK; i += Vec::kStep)
        store_plain<Format>(row + at + Format::row_bytes(i), out.place());
    }
  }
};
