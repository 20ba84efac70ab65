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
// Of a panel, which holds a block of rows: with what it is multiplied by it must stay in the second-level
// cache, and there are two, one that is multiplied and one that is being filled.
inline constexpr size_t kPairsPanelBytes = size_t{64} << 10;
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

// The panel at `data` for blocks of at most `rows` rows.
KT_INLINE PairsPanel pairs_panel(std::byte* data, uint32_t rows) {
  return {data, round_up(rows, kPairsStep) / 2 * kPairsBytes};
}

// Interleaves a block of rows, [s0, s1), pair by pair.
template <class Rows>
class PanelFill {
 public:
  KT_INLINE PanelFill(const Rows& rows, uint32_t s0, uint32_t s1, const PairsPanel& panel)
      : rows_(rows),
        panel_(panel),
        to_(panel.data),
        next_(s0),
        end_(s1),
        padded_(s0 + static_cast<uint32_t>(round_up(s1 - s0, kPairsStep))) {}
  KT_INLINE uint32_t num_pairs() const { return static_cast<uint32_t>(div_up(end_ - next_, 2)); }

  KT_INLINE void pair() {
    const uint32_t s = next_, columns = rows_.columns();
    rows_.template prefetch<3>(s + kRowsAhead);
    rows_.template prefetch<3>(s + kRowsAhead + 1);
    const std::byte* even = rows_.row(s);
    const std::byte* odd = s + 1 < end_ ? rows_.row(s + 1) : kZeroRow;
    std::byte* group = to_;
    uint32_t k = 0;
    for (; k + kInterleaveColumns <= columns; k += kInterleaveColumns) {
      interleave_columns(even + k * sizeof(bf16), odd + k * sizeof(bf16), group, panel_.group_bytes);
      group += kInterleaveColumns / kGroupColumns * panel_.group_bytes;
    }
    if (k < columns)
      interleave_last(even + k * sizeof(bf16), odd + k * sizeof(bf16), columns - k, group,
                      panel_.group_bytes);
    next_ = s + 2;
    to_ += kPairsBytes;
  }

  // What is left, and the zeros behind it.
  KT_INLINE void finish() {
    while (next_ < end_) pair();
    if (next_ >= padded_) return;
    const size_t padding = (padded_ - next_) / 2 * kPairsBytes;
    for (uint32_t g = 0; g < num_groups(rows_.columns()); ++g)
      std::memset(to_ + g * panel_.group_bytes, 0, padding);
    next_ = padded_;
  }

 private:
  const Rows& rows_;
  const PairsPanel panel_;
  std::byte* to_;
  uint32_t next_, end_, padded_;
};

template <class Rows>
void fill_pairs(const Rows& rows, uint32_t s0, uint32_t s1, const PairsPanel& panel) {
  PanelFill<Rows>(rows, s0, s1, panel).finish();
}

// What is done while a block is multiplied, a little at a time, so that the units that multiply, those that
// interleave and memory work at once: the next block is filled, or behind the last one the rows that the
// caller multiplies by next are asked for, into the second-level cache.
template <class Rows>
class BlockAhead {
 public:
  KT_INLINE BlockAhead(const PanelFill<Rows>& fill, const Rows& next, uint32_t num_next)
      : fill_(fill), next_(next), pairs_(fill.num_pairs()), num_next_(pairs_ ? 0 : num_next) {}

  KT_INLINE void spread_over(size_t times) {
    each_ = static_cast<uint32_t>(div_up(pairs_ + num_next_, times));
  }
  KT_INLINE void ask() {
    for (uint32_t i = 0; i < each_; ++i) {
      if (pairs_ > 0) {
        fill_.pair();
        --pairs_;
      } else if (asked_ < num_next_) {
        next_.template prefetch<2>(asked_++);
      }
    }
  }
  KT_INLINE void finish() { fill_.finish(); }

 private:
  PanelFill<Rows> fill_;
  const Rows& next_;
  uint32_t pairs_, num_next_, asked_ = 0, each_ = 0;
};
struct NothingAhead {
  KT_INLINE void spread_over(size_t) {}
  KT_INLINE void ask() {}
};

// Walks over the blocks of the rows of a weight: product.run(s0, s1, panel, ahead) for each.
template <class Format, class Product>
KT_INLINE void for_blocks(const NnArgs& a, const Product& product) {
  using Rows = WeightRows<Format>;
  const uint32_t n = a.g.k, block = pairs_block_rows(a.k1 - a.k0), longest = smaller(n, block);
  const PairsPanel panels[2] = {pairs_panel(a.scratch, longest),
                                pairs_panel(a.scratch + kPairsPanelBytes, longest)};
  const Rows rows{a.w, n, a.k0, a.k1, a.scratch + 2 * kPairsPanelBytes};
  const Rows next{a.next_w, a.next_n, a.next_k0, a.next_k1, nullptr};
  const uint32_t num_next = a.next_w.data ? smaller(a.next_n, block) : 0;
  fill_pairs(rows, 0, longest, panels[0]);
  uint32_t i = 0;
  for (uint32_t s0 = 0; s0 == 0 || s0 < n; s0 += block, i ^= 1) {
    const uint32_t s1 = smaller(n, s0 + block);
    BlockAhead<Rows> ahead(PanelFill<Rows>(rows, s1, smaller(n, s1 + block), panels[i ^ 1]), next, num_next);
    product.run(s0, s1, panels[i], ahead);
    ahead.finish();
  }
}
inline constexpr size_t kNnScratchBytes = 2 * kPairsPanelBytes + kDecodedBytes;
