// NN on vectors: C[m, k - k0] (+)= sum_n G[m, n] W[n, k].
//
// A block of W's rows is interleaved in pairs (pairs.h). A register tile is kPairRows left rows x kPairGroups
// groups of columns, a lane an output: a pair of a left row, broadcast, meets a pair of rows of W in each.
// The sum runs along n alone in every lane, and waits in C between blocks of n; so its order is that of n.
//
// Left rows are read in place, their pairs any distance apart: 4 bytes in rows of G, a cache line where G is
// itself interleaved (tn_rows.h).

inline size_t left_bytes_rows(uint32_t, uint32_t) { return 0; }

inline Operand pack_left_rows(const RowsView& rows, uint32_t m, uint32_t n, std::byte*) {
  return Operand{reinterpret_cast<const std::byte*>(rows.data), rows.stride * sizeof(bf16), rows.index, m, n};
}

inline size_t nn_scratch_bytes_rows() { return kNnScratchBytes; }

// A block of the summed dimension. Row i of the left operand begins at left[i] + left_at.
struct PairsBlock {
  const std::byte* const* left;
  uint32_t num_left;
  size_t left_at, left_pair_bytes;
  PairsPanel right;
  uint32_t length;  // summed elements
  float* c;
  size_t c_stride;
  uint32_t columns;
  bool zero_first;
};

// A register tile: kRows left rows by kGroups groups, in whole vectors.
template <int kRows, int kGroups>
struct PairsTile {
  static constexpr int kPerGroup = kGroupColumns / Vec::kWidth, kVectors = kGroups * kPerGroup;
  const std::byte* left[kRows];
  Vec::Acc acc[kRows][kVectors];

  // One pair of summed rows. Of a left row kBytes are read: two where the sum ends inside a pair.
  template <size_t kBytes>
  KT_INLINE void step(size_t at, const std::byte* right, size_t group_bytes) {
    Vec::Pairs rights[kVectors];
    KT_UNROLL for (int v = 0; v < kVectors; ++v) {
      rights[v] =
          Vec::load_pairs(right + v / kPerGroup * group_bytes + v % kPerGroup * (kPairsBytes / kPerGroup));
    }
    KT_UNROLL for (int t = 0; t < kRows; ++t) {
      uint32_t pair = 0;
      std::memcpy(&pair, left[t] + at, kBytes);
      const Vec::Pairs lefts = Vec::broadcast_pair(pair);
      KT_UNROLL for (int v = 0; v < kVectors; ++v) Vec::dot_pairs(acc[t][v], lefts, rights[v]);
    }
  }

  // Left rows from i on by groups from g on, summed in C at `c`.
  template <class Ahead>
  KT_INLINE void run(const PairsBlock& b, uint32_t i, uint32_t g, float* c, size_t c_stride, Ahead& ahead) {
    KT_UNROLL for (int t = 0; t < kRows; ++t) {
      left[t] = b.left[i + t] + b.left_at;
      KT_UNROLL for (int v = 0; v < kVectors; ++v) {
        acc[t][v] = b.zero_first ? Vec::zero_acc() : Vec::load_f(c + t * c_stride + v * Vec::kWidth);
      }
    }
    const std::byte* right = b.right.data + g * b.right.group_bytes;
    size_t at = 0;
    for (uint32_t pairs = b.length / 2; pairs > 0;) {
      ahead.ask();
      const uint32_t some = smaller(pairs, kPairsStep / 2);
      pairs -= some;
      for (uint32_t j = 0; j < some; ++j, at += b.left_pair_bytes, right += kPairsBytes)
        step<2 * sizeof(bf16)>(at, right, b.right.group_bytes);
    }
    if (b.length % 2 != 0) step<sizeof(bf16)>(at, right, b.right.group_bytes);
    KT_UNROLL for (int t = 0; t < kRows; ++t) {
      KT_UNROLL for (int v = 0; v < kVectors; ++v) {
        Vec::store_f(c + t * c_stride + v * Vec::kWidth, acc[t][v]);
      }
    }
  }
};

// C may end inside the tile: then by way of whole vectors of its own.
template <int kRows, int kGroups, class Ahead>
void pairs_tile(const PairsBlock& b, uint32_t i, uint32_t g, Ahead& ahead) {
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

// The last `rows` left rows, fewer than kRows + 1.
template <int kRows, int kGroups, class Ahead>
KT_INLINE void last_pairs_tile(const PairsBlock& b, uint32_t i, uint32_t g, uint32_t rows, Ahead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return pairs_tile<kRows, kGroups>(b, i, g, ahead);
    last_pairs_tile<kRows - 1, kGroups>(b, i, g, rows, ahead);
  }
}

// All left rows by groups from g on, which stay in the first- or second-level cache meanwhile.
template <int kGroups, class Ahead>
void pairs_strip(const PairsBlock& b, uint32_t g, Ahead& ahead) {
  uint32_t i = 0;
  for (; i + Vec::kPairRows <= b.num_left; i += Vec::kPairRows)
    pairs_tile<Vec::kPairRows, kGroups>(b, i, g, ahead);
  last_pairs_tile<Vec::kPairRows - 1, kGroups>(b, i, g, b.num_left - i, ahead);
}

template <class Ahead>
void pairs_product(const PairsBlock& b, Ahead& ahead) {
  constexpr uint32_t kWide = Vec::kPairGroups;
  const uint32_t groups = num_groups(b.columns);
  ahead.spread_over(div_up(groups, kWide) * div_up(b.num_left, Vec::kPairRows) *
                    div_up(b.length, kPairsStep));
  uint32_t g = 0;
  for (; g + kWide <= groups; g += kWide) pairs_strip<kWide>(b, g, ahead);
  if constexpr (kWide > 2) {
    for (; g + 2 <= groups; g += 2) pairs_strip<2>(b, g, ahead);
  }
  for (; g < groups; ++g) pairs_strip<1>(b, g, ahead);
}

struct NnRows {
  const NnArgs& args;
  const std::byte* const* left;

  template <class Ahead>
  KT_INLINE void run(uint32_t s0, uint32_t s1, const PairsPanel& panel, Ahead& ahead) const {
    const PairsBlock b{left,   args.g.rows,   s0 * sizeof(bf16), 2 * sizeof(bf16),           panel, s1 - s0,
                       args.c, args.c_stride, args.k1 - args.k0, s0 == 0 && !args.accumulate};
    pairs_product(b, ahead);
  }
};

template <class Format>
void nn_rows(const NnArgs& args) {
  const std::byte* left[kMaxPanelRows];
  for (uint32_t m = 0; m < args.g.rows; ++m) {
    const size_t row = args.g.index ? args.g.index[m] : m;
    left[m] = args.g.data + row * args.g.stride_bytes;
  }
  for_blocks<Format>(args, NnRows{args, left});
}
