// NN on the tile unit: C[m, k - k0] (+)= sum over terms of sum_n G[m, n] W[n, k].
//
// Rows of G are the A operand, packed to tiles once for all columns; a block of rows of W, interleaved in
// pairs (nn-inl.h), is the B operand. A step is two panels of 16 rows of G by two groups of 16 columns of W,
// so C is row-major and is stored in its final place. Sums are kept in C between blocks; blocks are whole
// steps, so the order of the sum is that of the steps from the first on.
//
// The lhs operand is panels of 16 rows, the last one only as tall as its rows: [N/32][rows][32] bf16, N
// padded with zeros. Few rows stay where they are (nn_few_rows-inl.h).

inline size_t lhs_bytes(uint32_t m, uint32_t n) { return div_up(m, kTileRows) * panel_bytes(n); }

inline Operand pack_lhs(const RowsView& rows, uint32_t m, uint32_t n, std::byte* data) {
  if (m <= kFewRows)
    return {reinterpret_cast<const std::byte*>(rows.data), rows.stride * sizeof(bf16), rows.index, m, n};
  constexpr size_t kStepBytes = kTileK * sizeof(bf16);
  const size_t row_bytes = n * sizeof(bf16), whole = row_bytes / kStepBytes * kStepBytes;
  for (uint32_t i = 0; i < m; ++i) {
    const uint32_t panel = i / kTileRows, height = smaller(m - panel * kTileRows, kTileRows);
    const size_t row = rows.index ? rows.index[i] : i;
    const auto* from = reinterpret_cast<const std::byte*>(rows.data + row * rows.stride);
    std::byte* to = data + panel * panel_bytes(n) + i % kTileRows * kStepBytes;
    for (size_t at = 0; at < whole; at += kStepBytes, to += height * kStepBytes)
      std::memcpy(to, from + at, kStepBytes);
    if (whole == row_bytes) continue;
    std::memset(to, 0, kStepBytes);
    std::memcpy(to, from + whole, row_bytes - whole);
  }
  return {data, panel_bytes(n), nullptr, m, n};
}

inline Operand lhs_in_place(const bf16* rows, size_t stride, uint32_t m, uint32_t n) {
  const auto* data = reinterpret_cast<const std::byte*>(rows);
  return {data, m <= kFewRows ? stride * sizeof(bf16) : panel_bytes(n), nullptr, m, n};
}

inline void pack_lhs_in_place(bf16* rows, size_t stride, uint32_t m, uint32_t n, std::byte* scratch) {
  if (m <= kFewRows) return;
  pack_lhs({rows, stride, nullptr}, m, n, scratch);
  std::memcpy(rows, scratch, m * round_up(n, kTileK) * sizeof(bf16));
}

inline size_t nn_scratch_bytes() { return kNnScratchBytes; }

// Steps of a lhs operand, and where their counterpart begins in each packed group.
struct TileSlice {
  Operand lhs;
  size_t step0, steps, rhs_at;
};

struct PairsTiles {
  static constexpr uint32_t kMaxSlices = NnBlock::kMaxSlices;
  TileSlice slices[kMaxSlices];
  uint32_t num_slices, num_steps, num_lhs;
  PackedPairs rhs;
  float* c;
  size_t c_stride;
  bool zero_first;
};

// Lhs panels p and, when kPanels is 2, p + 1, by groups g and, when kGroups is 2, g + 1.
template <int kPanels, int kGroups>
KT_INLINE void pairs_tiles(const PairsTiles& t, uint32_t p, uint32_t g, WorkAhead& ahead) {
  constexpr ptrdiff_t kRowBytes = kTileK * sizeof(bf16);
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

  for (uint32_t i = 0; i < t.num_slices; ++i) {
    const TileSlice& slice = t.slices[i];
    const size_t a0_step = panel_width(slice.lhs, p) * kRowBytes;
    const size_t a1_step = kPanels == 2 ? panel_width(slice.lhs, p + 1) * kRowBytes : 0;
    const std::byte* a0 = slice.lhs.data + p * slice.lhs.stride_bytes + slice.step0 * a0_step;
    const std::byte* a1 = slice.lhs.data + (p + 1) * slice.lhs.stride_bytes + slice.step0 * a1_step;
    const std::byte* b0 = t.rhs.data + g * t.rhs.group_bytes + slice.rhs_at;
    const std::byte* b1 = b0 + t.rhs.group_bytes;
    for (size_t s = 0; s < slice.steps;
         ++s, a0 += a0_step, a1 += a1_step, b0 += kStepPairsBytes, b1 += kStepPairsBytes) {
      ahead.advance();
      Tile::load<6>(b0, kPairsBytes);
      Tile::load<4>(a0, kRowBytes);
      Tile::dot_bf16<0, 4, 6>();
      if constexpr (kGroups == 2) {
        Tile::load<7>(b1, kPairsBytes);
        Tile::dot_bf16<1, 4, 7>();
      }
      if constexpr (kPanels == 2) {
        Tile::load<5>(a1, kRowBytes);
        Tile::dot_bf16<2, 5, 6>();
      }
      if constexpr (kPanels == 2 && kGroups == 2) Tile::dot_bf16<3, 5, 7>();
    }
  }

  Tile::store<0>(c0, c_stride);
  if constexpr (kGroups == 2) Tile::store<1>(c0 + kGroupColumns, c_stride);
  if constexpr (kPanels == 2) Tile::store<2>(c1, c_stride);
  if constexpr (kPanels == 2 && kGroups == 2) Tile::store<3>(c1 + kGroupColumns, c_stride);
}

// All lhs panels by all columns: a pair of groups stays in the cache while the panels pass.
void pairs_product(TileScope& scope, const PairsTiles& t, uint32_t columns, WorkAhead& ahead) {
  const uint32_t panels = static_cast<uint32_t>(div_up(t.num_lhs, kTileRows));
  const auto height = [&](uint32_t p) { return smaller(t.num_lhs - p * kTileRows, kTileRows); };
  ahead.spread_over(div_up(panels, 2) * div_up(num_groups(columns), 2) * t.num_steps);
  for (uint32_t g = 0; g < num_groups(columns); g += 2) {
    const uint32_t remaining = columns - g * kGroupColumns;
    const uint32_t columns0 = smaller(remaining, kGroupColumns);
    const uint32_t columns1 = smaller(remaining - columns0, kGroupColumns);
    for (uint32_t p = 0; p < panels; p += 2) {
      const bool two = p + 1 < panels;
      scope.use(columns0, columns1, height(p), two ? height(p + 1) : 0);
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
  uint32_t k0, k1;

  KT_INLINE void run(const NnBlock& block, const PackedPairs& packed, bool is_first, WorkAhead& ahead) {
    PairsTiles t;
    t.num_slices = block.num_slices, t.num_steps = block.num_steps;
    for (uint32_t i = 0; i < block.num_slices; ++i) {
      const NnSlice& slice = block.slices[i];
      t.slices[i] = {slice.term->g, (slice.term->n0 + slice.s0) / kTileK, div_up(slice.s1 - slice.s0, kTileK),
                     slice.step * kStepPairsBytes};
    }
    t.num_lhs = args.terms[0].g.rows, t.rhs = packed;
    t.c = args.c + (k0 - args.k0), t.c_stride = args.c_stride, t.zero_first = is_first && !args.accumulate;
    pairs_product(scope, t, k1 - k0, ahead);
  }
};

inline void nn(const NnArgs& args) {
  if (args.terms[0].g.rows <= kFewRows) return nn_few_rows(args);
  TileScope scope;
  for (uint32_t k0 = args.k0; k0 < args.k1; k0 += kMaxPackedColumns) {
    NnTiles product{args, scope, k0, smaller(args.k1, k0 + kMaxPackedColumns)};
    for_blocks(args, product.k0, product.k1, product);
  }
}
