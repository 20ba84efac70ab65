// Right operands of the products that sum over rows: R[s, k] of sum_s L[i, s] R[s, k], its rows interleaved
// in pairs. NN sums over the rows of a weight, TN over those of activations. Included inside a target's
// namespace, after its interleave_*.h.
//
// A panel is [groups of 16 columns][pairs of rows][16 dwords], a dword (R[s, k], R[s + 1, k]): a row of a
// group is a cache line, which tiles take as a row of B and vectors as one output a lane. Zeros stand behind
// the last column and, up to a multiple of kPairsStep, behind the last row.

inline constexpr uint32_t kGroupColumns = 16;
inline constexpr size_t kPairsBytes = kGroupColumns * 2 * sizeof(bf16);  // a pair of rows of a group
// Rows that a tile takes at a time: blocks of rows are multiples of it, so that the order of a sum does not
// depend on where blocks end.
inline constexpr uint32_t kPairsStep = 32;
// Of a panel: with what it is multiplied by it must stay in the second-level cache.
inline constexpr size_t kPairsPanelBytes = size_t{128} << 10;
// Rows lie a page or so apart, where no prefetcher of the hardware looks.
inline constexpr uint32_t kRowsAhead = 16;

alignas(kCacheLine) inline constexpr std::byte kZeroRow[kMaxBlockColumns * sizeof(bf16)] = {};

KT_INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
KT_INLINE uint32_t num_groups(uint32_t columns) {
  return static_cast<uint32_t>(div_up(columns, kGroupColumns));
}

// How many rows of so many columns a panel holds.
KT_INLINE uint32_t pairs_block_rows(uint32_t columns) {
  const size_t steps = kPairsPanelBytes / (num_groups(columns) * kPairsBytes * (kPairsStep / 2));
  return static_cast<uint32_t>(steps) * kPairsStep;
}

// All cache lines of [data, data + bytes).
template <int kHint>
KT_INLINE void prefetch_bytes(const std::byte* data, size_t bytes) {
  const std::byte* line = data - reinterpret_cast<uintptr_t>(data) % kCacheLine;
  for (; line < data + bytes; line += kCacheLine) __builtin_prefetch(line, 0, kHint);
}

// Columns [k0, k1) of the rows of a weight. Rows that are not bf16 are decoded into `decoded`, which has
// kDecodedBytes.
template <class Format>
struct WeightRows {
  WeightView w;
  uint32_t num_rows, k0, k1;
  std::byte* decoded;

  KT_INLINE uint32_t columns() const { return k1 - k0; }
  // Valid until the next row of the same parity is asked for.
  KT_INLINE const std::byte* row(uint32_t s) const {
    const std::byte* row = w.row(s);
    if constexpr (Unpack<Format>::kAsStored) {
      return row + Format::row_bytes(k0);
    } else {
      std::byte* to = decoded + s % 2 * (kMaxBlockColumns * sizeof(bf16));
      uint32_t k = k0;
      for (; k + Vec::kStep <= k1; k += Vec::kStep, to += Vec::kStep * sizeof(bf16))
        Vec::store(to, Unpack<Format>::segment(row, k));
      if (k < k1) Vec::store(to, Unpack<Format>::tail(row, k, k1 - k));
      return decoded + s % 2 * (kMaxBlockColumns * sizeof(bf16));
    }
  }
  template <int kHint>
  KT_INLINE void prefetch(uint32_t s) const {
    const size_t from = Format::row_bytes(k0);
    if (s < num_rows) prefetch_bytes<kHint>(w.row(s) + from, Format::row_bytes(k1) - from);
  }
};
inline constexpr size_t kDecodedBytes = 2 * kMaxBlockColumns * sizeof(bf16);

// The first columns of rows of bf16.
struct PlainRows {
  RowsView view;
  uint32_t num_rows, num_columns;

  KT_INLINE uint32_t columns() const { return num_columns; }
  KT_INLINE const std::byte* row(uint32_t s) const {
    const size_t row = view.index ? view.index[s] : s;
    return reinterpret_cast<const std::byte*>(view.data + row * view.stride);
  }
  template <int kHint>
  KT_INLINE void prefetch(uint32_t s) const {
    if (s < num_rows) prefetch_bytes<kHint>(row(s), num_columns * sizeof(bf16));
  }
};

struct PairsPanel {
  std::byte* data;
  size_t group_bytes;
};

// Interleaves rows [s0, s1), s1 - s0 at most a block and even unless it ends the sum.
template <class Rows>
void fill_pairs(const Rows& rows, uint32_t s0, uint32_t s1, const PairsPanel& panel) {
  const uint32_t columns = rows.columns();
  std::byte* to = panel.data;
  for (uint32_t s = s0; s < s1; s += 2, to += kPairsBytes) {
    rows.template prefetch<3>(s + kRowsAhead);
    rows.template prefetch<3>(s + kRowsAhead + 1);
    const std::byte* even = rows.row(s);
    const std::byte* odd = s + 1 < s1 ? rows.row(s + 1) : kZeroRow;
    std::byte* group = to;
    uint32_t k = 0;
    for (; k + kInterleaveColumns <= columns; k += kInterleaveColumns) {
      interleave_columns(even + k * sizeof(bf16), odd + k * sizeof(bf16), group, panel.group_bytes);
      group += kInterleaveColumns / kGroupColumns * panel.group_bytes;
    }
    if (k < columns)
      interleave_last(even + k * sizeof(bf16), odd + k * sizeof(bf16), columns - k, group, panel.group_bytes);
  }
  const size_t padding = panel.data + round_up(s1 - s0, kPairsStep) / 2 * kPairsBytes - to;
  for (uint32_t g = 0; g < num_groups(columns); ++g) std::memset(to + g * panel.group_bytes, 0, padding);
}

// The panel at `data` for blocks of at most `rows` rows.
KT_INLINE PairsPanel pairs_panel(std::byte* data, uint32_t rows) {
  return {data, round_up(rows, kPairsStep) / 2 * kPairsBytes};
}

// Rows of the next block, asked for while a block is multiplied, as thinly as still asks for all: so memory
// is busy meanwhile. They wait in the second-level cache.
template <class Rows>
struct RowsAhead {
  const Rows& rows;
  uint32_t next, end;
  uint32_t each = 0;  // rows at a time
  KT_INLINE void spread_over(size_t times) {
    if (next < end) each = static_cast<uint32_t>(div_up(end - next, times));
  }
  KT_INLINE void ask() {
    for (uint32_t i = 0; i < each && next < end; ++i) rows.template prefetch<2>(next++);
  }
};
struct NothingAhead {
  KT_INLINE void spread_over(size_t) {}
  KT_INLINE void ask() {}
};
