// NN on vectors: C[m, k - k0] (+)= sum over terms of sum_n G[m, n] W[n, k].
//
// A block of rows of W is interleaved in pairs (nn-inl.h). A register tile is kPairRows rows of the lhs x
// kPairGroups groups of columns, one lane per output: a pair of a row of the lhs is broadcast and multiplied
// by a pair of rows of W in each. Every lane sums along n only, and sums are kept in C between blocks of n;
// so the order is that of n.
//
// Rows of the lhs are read in place, with any stride between pairs: 4 bytes in rows of G, a cache line where
// G is itself interleaved (tn_rows-inl.h).

inline size_t lhs_bytes(uint32_t, uint32_t) { return 0; }

inline Operand pack_lhs(const RowsView& rows, uint32_t m, uint32_t n, std::byte*) {
  return Operand{reinterpret_cast<const std::byte*>(rows.data), rows.stride * sizeof(bf16), rows.index, m, n};
}

inline size_t nn_scratch_bytes() { return kNnScratchBytes; }

inline Operand lhs_in_place(const bf16* rows, size_t stride, uint32_t m, uint32_t n) {
  return {reinterpret_cast<const std::byte*>(rows), stride * sizeof(bf16), nullptr, m, n};
}

inline void pack_lhs_in_place(bf16*, size_t, uint32_t, uint32_t, std::byte*) {}

// Part of a sum: rows of the lhs, with pairs pair_bytes apart, and where their counterpart begins in
// each packed group.
struct RowsSlice {
  const std::byte* data;
  size_t row_bytes, pair_bytes;
  const int32_t* index;
  uint32_t
      per_group;  // rows of the lhs of a group of an interleaved G, whose groups are row_bytes apart; else 1
  uint32_t length;  // summed elements
  size_t rhs_at;

  KT_INLINE const std::byte* row(uint32_t i) const {
    if (per_group > 1) return data + i / per_group * row_bytes + i % per_group * 2 * sizeof(bf16);
    return data + static_cast<size_t>(index ? index[i] : i) * row_bytes;
  }
};

struct PairsBlock {
  static constexpr uint32_t kMaxSlices = NnBlock::kMaxSlices;
  RowsSlice slices[kMaxSlices];
  uint32_t num_slices, num_steps, num_lhs;
  PackedPairs rhs;
  float* c;
  size_t c_stride;
  uint32_t columns;
  bool zero_first;
};

// A register tile: kRows rows of the lhs by kGroups groups, in whole vectors.
template <int kRows, int kGroups>
struct PairsTile {
  static constexpr int kPerGroup = kGroupColumns / Vec::kWidth, kVectors = kGroups * kPerGroup;
  const std::byte* lhs[kRows];
  Vec::Acc acc[kRows][kVectors];

  // One pair of summed rows. Of a row of the lhs kBytes are read: two where the sum ends inside a pair.
  template <size_t kBytes>
  KT_INLINE void step(size_t at, const std::byte* rhs, size_t group_bytes) {
    Vec::Pairs rhs_pairs[kVectors];
    KT_UNROLL for (int v = 0; v < kVectors; ++v) {
      rhs_pairs[v] =
          Vec::load_pairs(rhs + v / kPerGroup * group_bytes + v % kPerGroup * (kPairsBytes / kPerGroup));
    }
    KT_UNROLL for (int t = 0; t < kRows; ++t) {
      uint32_t pair = 0;
      std::memcpy(&pair, lhs[t] + at, kBytes);
      const Vec::Pairs lhs_pair = Vec::broadcast_pair(pair);
      KT_UNROLL for (int v = 0; v < kVectors; ++v) Vec::dot_pairs(acc[t][v], lhs_pair, rhs_pairs[v]);
    }
  }

  // Rows of the lhs from i on by groups from g on, summed in C at `c`.
  KT_INLINE void run(const PairsBlock& b, uint32_t i, uint32_t g, float* c, size_t c_stride,
                     WorkAhead& ahead) {
    KT_UNROLL for (int t = 0; t < kRows; ++t) {
      KT_UNROLL for (int v = 0; v < kVectors; ++v) {
        acc[t][v] = b.zero_first ? Vec::zero_acc() : Vec::load_f(c + t * c_stride + v * Vec::kWidth);
      }
    }
    const size_t group_bytes = b.rhs.group_bytes;
    for (uint32_t j = 0; j < b.num_slices; ++j) {
      const RowsSlice& slice = b.slices[j];
      for (int t = 0; t < kRows; ++t) lhs[t] = slice.row(i + static_cast<uint32_t>(t));
      const std::byte* rhs = b.rhs.data + g * group_bytes + slice.rhs_at;
      size_t at = 0;
      for (uint32_t pairs = slice.length / 2; pairs > 0;) {
        ahead.advance();
        const uint32_t some = smaller(pairs, kPairsStep / 2);
        pairs -= some;
        for (uint32_t p = 0; p < some; ++p, at += slice.pair_bytes, rhs += kPairsBytes)
          step<2 * sizeof(bf16)>(at, rhs, group_bytes);
      }
      if (slice.length % 2 != 0) step<sizeof(bf16)>(at, rhs, group_bytes);
    }
    KT_UNROLL for (int t = 0; t < kRows; ++t) {
      KT_UNROLL for (int v = 0; v < kVectors; ++v) {
        Vec::store_f(c + t * c_stride + v * Vec::kWidth, acc[t][v]);
      }
    }
  }
};

// C may end inside the tile: then by way of whole vectors of its own.
template <int kRows, int kGroups>
void pairs_tile(const PairsBlock& b, uint32_t i, uint32_t g, WorkAhead& ahead) {
  constexpr uint32_t kColumns = kGroups * kGroupColumns;
  float* c = b.c + i * b.c_stride + g * kGroupColumns;
  const uint32_t columns = b.columns - g * kGroupColumns;
  PairsTile<kRows, kGroups> tile;
  if (columns >= kColumns) return tile.run(b, i, g, c, b.c_stride, ahead);
  alignas(kCacheLine) float whole[kRows * kColumns] = {};
  if (!b.zero_first) {
    for (int t = 0; t < kRows; ++t)
      std::memcpy(whole + t * kColumns, c + t * b.c_stride, columns * sizeof(float));
  }
  tile.run(b, i, g, whole, kColumns, ahead);
  for (int t = 0; t < kRows; ++t)
    std::memcpy(c + t * b.c_stride, whole + t * kColumns, columns * sizeof(float));
}

// The last `rows` rows of the lhs, fewer than kRows + 1.
template <int kRows, int kGroups>
KT_INLINE void last_pairs_tile(const PairsBlock& b, uint32_t i, uint32_t g, uint32_t rows, WorkAhead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return pairs_tile<kRows, kGroups>(b, i, g, ahead);
    last_pairs_tile<kRows - 1, kGroups>(b, i, g, rows, ahead);
  }
}

// All rows of the lhs by groups from g on, which stay in the L1 or L2 cache meanwhile.
template <int kGroups>
void pairs_strip(const PairsBlock& b, uint32_t g, WorkAhead& ahead) {
  uint32_t i = 0;
  for (; i + Vec::kPairRows <= b.num_lhs; i += Vec::kPairRows)
    pairs_tile<Vec::kPairRows, kGroups>(b, i, g, ahead);
  last_pairs_tile<Vec::kPairRows - 1, kGroups>(b, i, g, b.num_lhs - i, ahead);
}

void pairs_product(const PairsBlock& b, WorkAhead& ahead) {
  constexpr uint32_t kWide = Vec::kPairGroups;
  const uint32_t groups = num_groups(b.columns);
  ahead.spread_over(div_up(groups, kWide) * div_up(b.num_lhs, Vec::kPairRows) * b.num_steps);
  uint32_t g = 0;
  for (; g + kWide <= groups; g += kWide) pairs_strip<kWide>(b, g, ahead);
  if constexpr (kWide > 2) {
    for (; g + 2 <= groups; g += 2) pairs_strip<2>(b, g, ahead);
  }
  for (; g < groups; ++g) pairs_strip<1>(b, g, ahead);
}

struct NnRows {
  const NnArgs& args;
  uint32_t k0, k1;

  KT_INLINE void run(const NnBlock& block, const PackedPairs& packed, bool is_first, WorkAhead& ahead) {
    PairsBlock b;
    b.num_slices = block.num_slices, b.num_steps = block.num_steps;
    for (uint32_t i = 0; i < block.num_slices; ++i) {
      const NnSlice& slice = block.slices[i];
      const Operand& g = slice.term->g;
      b.slices[i] = {g.data + (slice.term->n0 + slice.s0) * sizeof(bf16),
                     g.stride_bytes,
                     2 * sizeof(bf16),
                     g.index,
                     1,
                     slice.s1 - slice.s0,
                     slice.step * kStepPairsBytes};
    }
    b.num_lhs = args.terms[0].g.rows, b.rhs = packed;
    b.c = args.c + (k0 - args.k0), b.c_stride = args.c_stride, b.columns = k1 - k0;
    b.zero_first = is_first && !args.accumulate;
    pairs_product(b, ahead);
  }
};

inline void nn(const NnArgs& args) {
  for (uint32_t k0 = args.k0; k0 < args.k1; k0 += kMaxPackedColumns) {
    NnRows product{args, k0, smaller(args.k1, k0 + kMaxPackedColumns)};
    for_blocks(args, product.k0, product.k1, product);
  }
}
