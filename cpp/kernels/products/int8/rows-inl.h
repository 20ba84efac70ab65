// Common to products of encoded weights with activations in int8: rows of both, and where outputs go.
// Included inside a target's namespace, after integers-inl.h.

// Of the integers that codes stand for: what has to be taken away from their products, as a factor of sums of
// activations.
template <class Of>
inline constexpr int kQuadBias = Of::kNarrow || kDotsWideCodes ? Of::kBias : 0;
template <class Of>
inline constexpr int kPairBias = Of::kNarrow ? Of::kBias : 0;

// Prefetches the block of eight rows that begins with value `at`. To the L2 cache: these are more lines at
// once than L1 keeps beside what is in use.
template <class Format>
KT_INLINE void prefetch_block(const EightRows& rows, size_t at) {
  constexpr size_t kLines = div_up(Format::row_bytes(4096) * Integers<Format>::kBlock / 4096, kCacheLine);
  KT_UNROLL for (int r = 0; r < 8; ++r) {
    const std::byte* ahead = rows.row(r) + Format::row_bytes(at);
    KT_UNROLL for (size_t line = 0; line < kLines; ++line)
        __builtin_prefetch(ahead + line * kCacheLine, 0, 2);
  }
}

// Columns [k0, k) of rows that end inside a block, with zeros behind them.
template <class Format>
struct RestOfRows {
  static constexpr size_t kBlock = Integers<Format>::kBlock;
  alignas(kCacheLine) std::byte codes[8][kBlock] = {};
  alignas(kCacheLine) std::byte scales[8][kBlock] = {};
  EightRows rows;

  void copy(const EightRows& all, size_t k0, size_t k) {
    rows = all;
    const auto code_bytes = [](size_t n) {
      if constexpr (requires { Format::code_bytes(n); }) return Format::code_bytes(n);
      return Format::row_bytes(n);
    };
    const auto scale_bytes = [&](size_t n) {
      if constexpr (Format::kScaleRows == 1) return Format::scale_bytes(n);
      return Format::row_bytes(n) - code_bytes(n);
    };
    for (int r = 0; r < 8; ++r) {
      std::memcpy(codes[r], all.row(r) + code_bytes(k0), code_bytes(k) - code_bytes(k0));
      const size_t from = scale_bytes(k0), bytes = scale_bytes(k) - from;
      if (bytes > 0) std::memcpy(scales[r], all.scales + r * all.scales_stride + from, bytes);
    }
    rows.data = codes[0], rows.stride = kBlock;
    rows.scales = scales[0], rows.scales_stride = kBlock;
  }
};

// Eight rows, and which outputs they are.
struct EightOutputs {
  EightRows rows;
  uint32_t n, first, count;  // outputs [n, n + count) are those of row `first` and behind
};

// From n on. Where fewer are left, the last eight again, or if there are none, the row n eight times.
template <class Format>
KT_INLINE EightOutputs next_eight(const NtArgs& args, uint32_t n) {
  const uint32_t left = args.n1 - n;
  if (left >= 8) return {EightRows::of<Format>(args.w, n), n, 0, 8};
  if (args.n1 - args.n0 >= 8) return {EightRows::of<Format>(args.w, args.n1 - 8), n, 8 - left, left};
  return {EightRows::repeated<Format>(args.w, n), n, 0, 1};
}

KT_INLINE BlockRow block_row(const NtArgs& args, uint32_t m, const BlockRowLayout& layout) {
  const size_t row = args.x.index ? static_cast<size_t>(args.x.index[m]) : m;
  return BlockRow(args.x.data + row * args.x.stride_bytes, layout);
}

// Outputs [n, n + count) of row m of the activations, in `sums` from `first` on.
KT_INLINE void store_outputs(const NtArgs& args, uint32_t m, uint32_t n, uint32_t first, uint32_t count,
                             Floats8 sums) {
  float out[8];
  store_8(out, sums);
#if KT_HAS_TILES
  const uint32_t panel = m / kPanelColumns, width = panel_width(args.x, panel);
  float* c = args.c + size_t{panel} * kPanelColumns * tile_n_padded(args.n1 - args.n0);
  c += (n - args.n0) * width + m % kPanelColumns;
  for (uint32_t i = 0; i < count; ++i) c[i * width] = out[first + i];
#else
  const size_t ld = args.c_stride ? args.c_stride : c_stride(args.n1 - args.n0);
  float* c = args.c + m * ld + (n - args.n0);
  if (count == 8) return store_8(c, sums);
  for (uint32_t i = 0; i < count; ++i) c[i] = out[first + i];
#endif
}

template <class Format>
KT_INLINE Floats8 with_channel_scale(const EightRows& rows, Floats8 sums) {
  if constexpr (Integers<Format>::kScalesSums) return mul_8(rows.channel_scales(), sums);
  return sums;
}
