// Products of encoded weights with many rows of activations in int8 on the tile unit (contract_int8.h).
//
// A block of K of 32 weight rows is decoded to tiles of signed bytes, and multiplied with panels of 16 rows
// of activations, four codes of each side by side. A tile of sums is 16 outputs x 16 rows of activations, to
// which the scales of both are applied on vectors:
//
//   acc[n][m] = fma(w_s[n] s_b[m], float(S[n][m]), acc[n][m])
//
// A tile is as wide as the group of weights that shares a scale, at most 64 columns. For groups of 16 or 32,
// scaling takes longer than the tile unit does. Integers with factors do not fit into a byte: they are two
// digits, 128 high + low, of a tile each.
// Included inside a target's namespace, after panel_blocks-inl.h and weight_tiles-inl.h.

// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 activations.
template <class Format>
class Int8TileScope {
 public:
  Int8TileScope() {
    constexpr size_t kColumns = WeightTiles<Format>::kColumns;
    TileConfig config;
    for (int tile = 0; tile < 7; ++tile) {
      const bool of_weights = tile == 4 || tile == 5, of_activations = tile == 6;
      config.rows[tile] = of_activations ? kColumns / 4 : kTileRows;
      config.column_bytes[tile] = of_weights ? kColumns : kPanelColumns * 4;
    }
    Tile::configure(config);
  }
  ~Int8TileScope() { Tile::release(); }
};

// Sums of a block: [group or digit][output][row of activations].
template <class Format>
using BlockTileSums =
    int32_t[WeightTiles<Format>::kGroups * WeightTiles<Format>::kDigits][kGroupRows][kPanelColumns];

// The sums of one group or digit, by two tiles.
template <class Format, int kFirst, int kSecond>
KT_INLINE void dot_tiles(const WeightTiles<Format>& w, const PanelBlock<Integers<Format>::kBlock>& x,
                         size_t group, size_t digit, int32_t (&sums)[kGroupRows][kPanelColumns]) {
  using Tiles = WeightTiles<Format>;
  constexpr ptrdiff_t kXRow = sizeof x.codes[0], kWRow = Tiles::kColumns, kRow = sizeof sums[0];
  Tile::zero<kFirst>(), Tile::zero<kSecond>();
  KT_UNROLL for (size_t i = 0; i < Tiles::kTilesOfGroup; ++i) {
    const size_t t = group * Tiles::kTilesOfGroup + i;
    Tile::load<6>(x.codes[t * Tiles::kColumns / 4], kXRow);
    Tile::load<4>(w.codes[digit][t][0], kWRow);
    Tile::load<5>(w.codes[digit][t][1], kWRow);
    Tile::dot_int8<kFirst, 4, 6>();
    Tile::dot_int8<kSecond, 5, 6>();
  }
  Tile::store<kFirst>(sums[0], kRow);
  Tile::store<kSecond>(sums[kTileRows], kRow);
}

// Two pairs of tiles take turns, so that one adds while the other is stored.
template <class Format>
KT_INLINE void dot_block(const WeightTiles<Format>& w, const PanelBlock<Integers<Format>::kBlock>& x,
                         BlockTileSums<Format>& sums) {
  using Tiles = WeightTiles<Format>;
  if constexpr (Tiles::kDigits == 2) {
    dot_tiles<Format, 0, 2>(w, x, 0, 0, sums[0]);
    dot_tiles<Format, 1, 3>(w, x, 0, 1, sums[1]);
  } else {
    KT_UNROLL for (size_t g = 0; g < Tiles::kGroups; g += 2) {
      dot_tiles<Format, 0, 2>(w, x, g, 0, sums[g]);
      if (g + 1 < Tiles::kGroups) dot_tiles<Format, 1, 3>(w, x, g + 1, 0, sums[g + 1]);
    }
  }
}

// What offsets add to output n of a block, of rows of activations from m on.
template <class Format>
KT_INLINE PanelVec::Floats add_offsets(const WeightTiles<Format>& w,
                                       const PanelBlock<Integers<Format>::kBlock>& x, size_t n, size_t m,
                                       PanelVec::Floats scale_of_x, PanelVec::Floats total) {
  PanelVec::Ints sum = PanelVec::zero();
  KT_UNROLL for (size_t pair = 0; pair < Format::kGroups / 2; ++pair) {
    const auto* sums_of_x = Format::kGroups == 16 ? x.sums16[pair] : x.sums32[pair];
    sum = PanelVec::dot_words(sum, PanelVec::broadcast(w.offset_pairs[n] + 2 * pair),
                              PanelVec::load(sums_of_x[m]));
  }
  return PanelVec::fma(PanelVec::mul(PanelVec::set_f(-w.offset[0][n]), scale_of_x), PanelVec::floats(sum),
                       total);
}

// The sum of the codes of a group of 32, of rows of activations from m on.
template <size_t kBlock>
KT_INLINE PanelVec::Floats sum_of_group(const PanelBlock<kBlock>& x, size_t g, size_t m) {
  const PanelVec::Ints pairs = PanelVec::load(x.sums32[g / 2][m]);
  return PanelVec::floats(g % 2 == 0 ? PanelVec::low_words(pairs) : PanelVec::high_words(pairs));
}

template <class Format>
KT_INLINE void add_scaled(const WeightTiles<Format>& w, const PanelBlock<Integers<Format>::kBlock>& x,
                          size_t groups, const BlockTileSums<Format>& sums, float* acc) {
  using Of = Integers<Format>;
  for (size_t n = 0; n < kGroupRows; ++n) {
    KT_UNROLL for (size_t m = 0; m < kPanelColumns; m += PanelVec::kLanes) {
      const PanelVec::Floats scale_of_x = PanelVec::load_f(x.scale + m);
      PanelVec::Floats total = PanelVec::load_f(acc + n * kPanelColumns + m);
      KT_UNROLL for (size_t g = 0; g < WeightTiles<Format>::kGroups; ++g) {
        if (g >= groups) break;
        PanelVec::Ints sum = PanelVec::load(sums[g][n] + m);
        if constexpr (Of::kHasFactors)
          sum = PanelVec::add(PanelVec::shifted<7>(sum), PanelVec::load(sums[1][n] + m));
        const auto scale = PanelVec::mul(PanelVec::set_f(w.scale[g][n]), scale_of_x);
        total = PanelVec::fma(scale, PanelVec::floats(sum), total);
        if constexpr (Of::kHasOffset && !Of::kHasFactors) {
          static_assert(Of::kGroup == 32);
          const auto offset = PanelVec::mul(PanelVec::set_f(w.offset[g][n]), scale_of_x);
          total = PanelVec::fma(offset, sum_of_group(x, g, m), total);
        }
      }
      if constexpr (Of::kHasOffset && Of::kHasFactors) total = add_offsets(w, x, n, m, scale_of_x, total);
      PanelVec::store_f(acc + n * kPanelColumns + m, total);
    }
  }
}

// 32 outputs, of which `outputs` says which they are.
template <class Format>
void int8_tile_group(const NtArgs& args, const EightOutputs (&outputs)[kGroupRows / 8], float* sums) {
  using Of = Integers<Format>;
  using Panel = PanelBlock<Of::kBlock>;
  constexpr size_t kPanelFloats = size_t{kGroupRows} * kPanelColumns;
  const size_t k = args.x.k, blocks = div_up(k, Of::kBlock), panels = div_up(args.x.rows, kPanelColumns);
  const auto* x = reinterpret_cast<const Panel*>(args.x.panels);
  std::memset(sums, 0, panels * kPanelFloats * sizeof(float));
  WeightTiles<Format> weights;
  for (size_t block = 0; block < blocks; ++block) {
    const size_t at = block * Of::kBlock, columns = k - at < Of::kBlock ? k - at : Of::kBlock;
    for (size_t e = 0; e < kGroupRows / 8; ++e) {
      const EightRows& rows = outputs[e].rows;
      if (BlockFormat<Format> || columns == Of::kBlock) {
        weights.decode(rows, e, at, columns);
      } else if constexpr (!BlockFormat<Format>) {
        RestOfRows<Format> rest;
        rest.copy(rows, at, k);
        weights.decode(rest.rows, e, 0, columns);
      }
      const bool is_last = block + 1 == blocks;
      prefetch_block<Format>(is_last ? rows.behind(kGroupRows) : rows, is_last ? 0 : at + Of::kBlock);
    }
    for (size_t panel = 0; panel < panels; ++panel) {
      const Panel& of_panel = x[panel * blocks + block];
      alignas(kCacheLine) BlockTileSums<Format> of_block;
      dot_block(weights, of_panel, of_block);
      add_scaled(weights, of_panel, div_up(columns, Of::kGroup), of_block, sums + panel * kPanelFloats);
    }
  }
}

// To C, whose rows are outputs, as wide as the panel.
template <class Format>
void store_panels(const NtArgs& args, const EightOutputs (&outputs)[kGroupRows / 8], float* sums) {
  for (uint32_t m = 0; m < args.x.rows; m += kPanelColumns, sums += size_t{kGroupRows} * kPanelColumns) {
    const uint32_t width = panel_width(args.x, m / kPanelColumns);
    float* c = args.c + size_t{m} * tile_n_padded(args.n1 - args.n0);
    for (size_t e = 0; e < kGroupRows / 8; ++e) {
      for (uint32_t i = 0; i < outputs[e].count; ++i) {
        float* row = sums + (8 * e + outputs[e].first + i) * kPanelColumns;
        const uint32_t n = outputs[e].n + i;
        if constexpr (Integers<Format>::kScalesSums)
          for (uint32_t j = 0; j < kPanelColumns; ++j) row[j] *= args.w.channel_scale[n];
        std::memcpy(c + (n - args.n0) * width, row, width * sizeof(float));
      }
    }
  }
}

template <class Format>
void int8_tiles(const NtArgs& args) {
  alignas(kCacheLine) float sums[kMaxCallRows * kGroupRows];
  const Int8TileScope<Format> scope;
  for (uint32_t n = args.n0; n < args.n1;) {
    EightOutputs outputs[kGroupRows / 8];
    for (EightOutputs& of : outputs) {
      of = next_eight<Format>(args, n < args.n1 ? n : args.n1 - 1);
      if (n >= args.n1) of.count = 0;
      n += of.count;
    }
    int8_tile_group<Format>(args, outputs, sums);
    store_panels<Format>(args, outputs, sums);
  }
}
