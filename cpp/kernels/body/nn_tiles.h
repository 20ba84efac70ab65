// NN on the tile unit: C[m, k - k0] (+)= sum_n G[m, n] W[n, k].
//
// Rows of G are the A operand, packed to tiles once for all columns; a block of W's rows, interleaved in
// pairs (pairs.h), is the B operand. A step is two panels of 16 rows of G by two groups of 16 columns of W,
// so C comes out row-major and is stored where it is wanted. Sums wait in C between blocks of n; blocks are
// whole steps, so the order along n is that of the steps from n = 0 on.
//
// The left operand is panels of 16 rows, the last one only as tall as its rows: [N/32][rows][32] bf16, N
// padded with zeros. Rows that lie one after the other in whole steps stay where they are.

inline size_t left_bytes_tiles(uint32_t m, uint32_t n) { return div_up(m, kTileRows) * panel_bytes(n); }

inline Operand pack_left_tiles(const RowsView& rows, uint32_t m, uint32_t n, std::byte* data) {
  constexpr size_t kStepBytes = kTileK * sizeof(bf16);
  const PlainRows source{rows, m, n};
  const size_t stride = rows.stride * sizeof(bf16);
  // Rows of a tile a multiple of this apart would fall into few sets of the first-level cache.
  constexpr size_t kCrowded = 1024;
  if (n % kTileK == 0 && (m == 1 || (rows.index == nullptr && stride % kCrowded != 0)))
    return Operand{source.row(0), stride, nullptr, m, n, /*rows_in_place=*/true};
  const size_t row_bytes = n * sizeof(bf16), whole = row_bytes / kStepBytes * kStepBytes;
  for (uint32_t i = 0; i < m; ++i) {
    const uint32_t panel = i / kTileRows, height = smaller(m - panel * kTileRows, kTileRows);
    const std::byte* from = source.row(i);
    std::byte* to = data + panel * panel_bytes(n) + i % kTileRows * kStepBytes;
    for (size_t at = 0; at < whole; at += kStepBytes, to += height * kStepBytes)
      std::memcpy(to, from + at, kStepBytes);
    if (whole == row_bytes) continue;
    std::memset(to, 0, kStepBytes);
    std::memcpy(to, from + whole, row_bytes - whole);
  }
  return Operand{data, panel_bytes(n), nullptr, m, n};
}

inline size_t nn_scratch_bytes_tiles() { return kNnScratchBytes; }

// A block of the summed dimension, in steps.
struct PairsTiles {
  Operand left;
  size_t step0, steps;
  PairsPanel right;
  float* c;
  size_t c_stride;
  bool zero_first;
};

// Left panels p and, when kPanels is 2, p + 1, by groups g and, when kGroups is 2, g + 1.
template <int kPanels, int kGroups, class Ahead>
KT_INLINE void pairs_tiles(const PairsTiles& t, uint32_t p, uint32_t g, Ahead& ahead) {
  constexpr ptrdiff_t kRowBytes = kTileK * sizeof(bf16), kStepBytes = kTileRows * kRowBytes;
  const ptrdiff_t c_stride = static_cast<ptrdiff_t>(t.c_stride * sizeof(float));
  float* c0 = t.c + size_t{p} * kTileRows * t.c_stride + g * kGroupColumns;
  float* c1 = c0 + kTileRows * t.c_stride;  // of the second panel
  if (t.zero_first) {
    Tile::zero<0>();
    if constexpr (kGroups == 2) Tile::zero<1>();
    if constexpr (kPanels == 2) Tile::zero<2>();
    if constexpr (kPanels == 2 && kGroups == 2) Tile::zero<3>();
  } else {
    Tile::load<0>(c0, c_stride);
    if constexpr (kGroups == 2) Tile::load<1>(c0 + kGroupColumns, c_stride);
    if constexpr (kPanels == 2) Tile::load<2>(c1, c_stride);
    if constexpr (kPanels == 2 && kGroups == 2) Tile::load<3>(c1 + kGroupColumns, c_stride);
  }

  const bool in_place = t.left.rows_in_place;
  const ptrdiff_t a_row = in_place ? static_cast<ptrdiff_t>(t.left.stride_bytes) : kRowBytes;
  const size_t panel_bytes = in_place ? kTileRows * t.left.stride_bytes : t.left.stride_bytes;
  const size_t a0_step = in_place ? kRowBytes : panel_width(t.left, p) * kRowBytes;
  const size_t a1_step = in_place || kPanels == 1 ? kRowBytes : panel_width(t.left, p + 1) * kRowBytes;
  const std::byte* a0 = t.left.data + p * panel_bytes + t.step0 * a0_step;
  const std::byte* a1 = t.left.data + (p + 1) * panel_bytes + t.step0 * a1_step;
  const std::byte* b0 = t.right.data + g * t.right.group_bytes;
  const std::byte* b1 = b0 + t.right.group_bytes;
  for (size_t s = 0; s < t.steps; ++s, a0 += a0_step, a1 += a1_step, b0 += kStepBytes, b1 += kStepBytes) {
    ahead.ask();
    Tile::load<6>(b0, kPairsBytes);
    Tile::load<4>(a0, a_row);
    Tile::dot_bf16<0, 4, 6>();
    if constexpr (kGroups == 2) {
      Tile::load<7>(b1, kPairsBytes);
      Tile::dot_bf16<1, 4, 7>();
    }
    if constexpr (kPanels == 2) {
      Tile::load<5>(a1, a_row);
      Tile::dot_bf16<2, 5, 6>();
    }
    if constexpr (kPanels == 2 && kGroups == 2) Tile::dot_bf16<3, 5, 7>();
  }

  Tile::store<0>(c0, c_stride);
  if constexpr (kGroups == 2) Tile::store<1>(c0 + kGroupColumns, c_stride);
  if constexpr (kPanels == 2) Tile::store<2>(c1, c_stride);
  if constexpr (kPanels == 2 && kGroups == 2) Tile::store<3>(c1 + kGroupColumns, c_stride);
}

// All left panels by all columns: a pair of groups stays in the first-level cache while the panels pass.
template <class Ahead>
void pairs_product(TileScope& scope, const PairsTiles& t, uint32_t columns, Ahead& ahead) {
  const uint32_t panels = static_cast<uint32_t>(div_up(t.left.rows, kTileRows));
  ahead.spread_over(div_up(panels, 2) * div_up(num_groups(columns), 2) * t.steps);
  for (uint32_t g = 0; g < num_groups(columns); g += 2) {
    const uint32_t left = columns - g * kGroupColumns;
    const uint32_t columns0 = smaller(left, kGroupColumns);
    const uint32_t columns1 = smaller(left - columns0, kGroupColumns);
    for (uint32_t p = 0; p < panels; p += 2) {
      const bool two = p + 1 < panels;
      scope.use(columns0, columns1, panel_width(t.left, p), two ? panel_width(t.left, p + 1) : 0);
      if (two && columns1) {
        pairs_tiles<2, 2>(t, p, g, ahead);
      } else if (two) {
        pairs_tiles<2, 1>(t, p, g, ahead);
      } else if (columns1) {
        pairs_tiles<1, 2>(t, p, g, ahead);
      } else {
        pairs_tiles<1, 1>(t, p, g, ahead);
      }
    }
  }
}

struct NnTiles {
  const NnArgs& args;
  TileScope& scope;

  template <class Ahead>
  KT_INLINE void run(uint32_t s0, uint32_t s1, const PairsPanel& panel, Ahead& ahead) const {
    const PairsTiles t{args.g, s0 / kTileK,   div_up(s1 - s0, kTileK),    panel,
                       args.c, args.c_stride, s0 == 0 && !args.accumulate};
    pairs_product(scope, t, args.k1 - args.k0, ahead);
  }
};

template <class Format>
void nn_tiles(const NnArgs& args) {
  TileScope scope;
  for_blocks<Format>(args, NnTiles{args, scope});
}
