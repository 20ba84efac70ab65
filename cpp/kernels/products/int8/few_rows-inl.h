// Products of encoded weights with few rows of activations in int8 (contract_int8.h), weights in place.
//
// Eight weight rows at a time: each has a vector of partial sums of a group, and adding the eight vectors
// while they are transposed gives the sums of the group as one vector, to which scales are applied.
//
//   codes of row 0 . x -> [. . . . . . . .]  |
//   codes of row 1 . x -> [. . . . . . . .]  | transposed, added -> [S0 S1 .. S7] -> acc
//   ...                                     /
//
// Included inside a target's namespace, after integers-inl.h.

// Up to this many rows of activations share the decoding.
inline constexpr int kFewRows = 4;

// Of the integers that codes stand for: what has to be taken away from their products, as a factor of sums of
// activations.
template <class Of>
inline constexpr int kQuadBias = Of::kNarrow || kDotsWideCodes ? Of::kBias : 0;
template <class Of>
inline constexpr int kPairBias = Of::kNarrow ? Of::kBias : 0;

// Groups [0, groups) of the block of activations that starts with value k of `x` and with value `at` of the
// weights.
template <class Format, int kTokens>
KT_INLINE void add_groups(const EightRows& rows, size_t at, const BlockRow* x, size_t k, size_t groups,
                          Floats8 (&acc)[kTokens]) {
  using Of = Integers<Format>;
  constexpr size_t kGroup = Of::kGroup, kStep = 32;
  const size_t block = k / Of::kBlock;
  const auto scales = Of::open(rows, at / kGroup);
  const auto add = [&](size_t g, int t, Ints8 sums, int32_t sum_of_x) {
    if constexpr (kQuadBias<Of> != 0) sums = minus_ints(sums, set_ints(kQuadBias<Of> * sum_of_x));
    const Floats8 scale = mul_8(scales.scale(g), set_8(x[t].scales[block]));
    acc[t] = fma_8(scale, floats_of(sums), acc[t]);
    if constexpr (Of::kHasOffset) {
      const Floats8 offset = mul_8(Of::offsets(rows, at / kGroup + g), set_8(x[t].scales[block]));
      acc[t] = fma_8(offset, set_8(static_cast<float>(sum_of_x)), acc[t]);
    }
  };
  constexpr size_t kSteps = kGroup < kStep ? 1 : kGroup / kStep, kGroups = kGroup < kStep ? 2 : 1;
  for (size_t g = 0; g < groups; g += kGroups) {
    Ints8 sums[kTokens][8];
    KT_UNROLL for (int r = 0; r < 8; ++r) {
      KT_UNROLL for (size_t s = 0; s < kSteps; ++s) {
        const size_t value = g * kGroup + s * kStep;
        const Bytes32 codes = Of::codes(rows, r, at + value);
        KT_UNROLL for (int t = 0; t < kTokens; ++t) {
          const Ints8 before = s == 0 ? zero_ints() : sums[t][r];
          sums[t][r] = dot_quads<Of::kNarrow>(before, codes, load_32(x[t].codes + k + value));
        }
      }
    }
    KT_UNROLL for (int t = 0; t < kTokens; ++t) {
      const int16_t* of_x = x[t].sums16 + (k + g * kGroup) / 16;
      if constexpr (kGroups == 2) {
        Ints8 low, high;
        sums_of_halves(sums[t], low, high);
        add(g, t, low, of_x[0]);
        if (g + 1 < groups) add(g + 1, t, high, of_x[1]);
      } else {
        int32_t sum_of_x = 0;
        if constexpr (kQuadBias<Of> != 0 || Of::kHasOffset) {
          for (size_t i = 0; i < kGroup / 16; ++i) sum_of_x += of_x[i];
        }
        add(g, t, sums_of_eight(sums[t]), sum_of_x);
      }
    }
  }
}

// The block of 256 values from k on, whose groups have integer factors.
template <class Format, int kTokens>
KT_INLINE void add_factored_block(const EightRows& rows, const BlockRow* x, size_t k,
                                  Floats8 (&acc)[kTokens]) {
  using Of = Integers<Format>;
  constexpr size_t kGroups = Format::kGroups;
  const auto sums_of_x = [&](int t) {
    return load_sums<kGroups>(kGroups == 16 ? x[t].sums16 + k / 16 : x[t].sums32 + k / 32);
  };
  Ints8 sums[kTokens][8], offsets[kTokens][8];
  KT_NO_UNROLL for (int r = 0; r < 8; ++r) {
    formats::GroupNumbers numbers;
    Format::group_numbers(Of::block(rows.row(r), k), numbers);
    const Words16 factors = words_to_spread<kGroups>(numbers.scale);
    Ints8 sum[kTokens];
    KT_UNROLL for (size_t g = 0; g < 8; ++g) {
      const Bytes32 codes = Of::codes(rows, r, k + 32 * g);
      const Words16 factor = spread_group(factors, g);
      KT_UNROLL for (int t = 0; t < kTokens; ++t) {
        const Words16 pairs = dot_pairs<Of::kNarrow>(codes, load_32(x[t].codes + k + 32 * g));
        sum[t] = dot_words(g == 0 ? zero_ints() : sum[t], pairs, factor);
      }
    }
    KT_UNROLL for (int t = 0; t < kTokens; ++t) {
      if constexpr (kPairBias<Of> != 0) {
        const Ints8 of_x = dot_words(zero_ints(), group_words<kGroups>(numbers.scale), sums_of_x(t));
        sum[t] = minus_ints(sum[t], shift_left<std::countr_zero(unsigned{kPairBias<Of>})>(of_x));
      }
      sums[t][r] = sum[t];
      if constexpr (Of::kHasOffset)
        offsets[t][r] = dot_words(zero_ints(), group_words<kGroups>(numbers.offset), sums_of_x(t));
    }
  }
  const Floats8 scale = Of::open(rows, k / 256).scale(0);
  KT_UNROLL for (int t = 0; t < kTokens; ++t) {
    const Floats8 of_x = set_8(x[t].scales[k / 256]);
    acc[t] = fma_8(mul_8(scale, of_x), floats_of(sums_of_eight(sums[t])), acc[t]);
    if constexpr (Of::kHasOffset) {
      const Floats8 minus = mul_8(Of::offsets(rows, k / 256), set_8(-x[t].scales[k / 256]));
      acc[t] = fma_8(minus, floats_of(sums_of_eight(offsets[t])), acc[t]);
    }
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
  // Other formats with one have it among the scales of their groups.
  if constexpr (std::is_same_v<Format, formats::NvFp4>) {
    return mul_8(rows.channel_scales(), sums);
  }
  return sums;
}

// Outputs [n, n + 8) of kTokens rows of activations. Meanwhile the eight rows behind are prefetched.
template <class Format, int kTokens>
KT_INLINE void dot_eight(const EightRows& rows, const BlockRow* x, size_t k, Floats8 (&acc)[kTokens]) {
  using Of = Integers<Format>;
  constexpr size_t kBlock = Of::kBlock;
  constexpr size_t kLines = div_up(Format::row_bytes(4096) * kBlock / 4096, kCacheLine);
  KT_UNROLL for (int t = 0; t < kTokens; ++t) acc[t] = set_8(0.0f);
  size_t at = 0;
  const size_t whole = BlockFormat<Format> ? k : k / kBlock * kBlock;
  for (; at < whole; at += kBlock) {
    KT_UNROLL for (int r = 0; r < 8; ++r) {
      const std::byte* ahead = rows.row(r + 8) + Format::row_bytes(at);
      KT_UNROLL for (size_t line = 0; line < kLines; ++line)
          __builtin_prefetch(ahead + line * kCacheLine, 0, 2);
    }
    if constexpr (Of::kHasFactors) {
      add_factored_block<Format>(rows, x, at, acc);
    } else {
      const size_t left = div_up(k - at, Of::kGroup);
      add_groups<Format>(rows, at, x, at, left < kBlock / Of::kGroup ? left : kBlock / Of::kGroup, acc);
    }
  }
  if constexpr (!BlockFormat<Format>) {
    if (at < k) {
      RestOfRows<Format> rest;
      rest.copy(rows, at, k);
      add_groups<Format>(rest.rows, 0, x, at, div_up(k - at, Of::kGroup), acc);
    }
  }
}

// Rows [m, m + kTokens) of the activations, or those that are left.
template <class Format, int kTokens>
void int8_few_rows(const NtArgs& args, uint32_t m) {
  const BlockRowLayout layout(args.x.k, Integers<Format>::kBlock);
  const uint32_t left = args.x.rows - m, count = left < kTokens ? left : kTokens;
  BlockRow x[kTokens];
  for (uint32_t t = 0; t < kTokens; ++t) x[t] = block_row(args, m + (t < count ? t : count - 1), layout);
  for (uint32_t n = args.n0; n < args.n1;) {
    const EightOutputs outputs = next_eight<Format>(args, n);
    Floats8 acc[kTokens];
    dot_eight<Format, kTokens>(outputs.rows, x, args.x.k, acc);
    for (uint32_t t = 0; t < count; ++t)
      store_outputs(args, m + t, n, outputs.first, outputs.count,
                    with_channel_scale<Format>(outputs.rows, acc[t]));
    n += outputs.count;
  }
}
