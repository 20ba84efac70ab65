// Products of encoded weights with many rows of activations in int8 on the tile unit (contract_int8.h).
//
// A block of K of 32 weight rows is decoded to tiles of signed bytes, 16 rows x 64 columns; the activations
// are panels of 16 rows, four codes of each side by side, as in products of bf16. A tile of sums is 16
// outputs x 16 rows of activations, to which the scales of both are applied on vectors:
//
//   acc[n][m] = fma(w_s[n] s_b[m], float(S[n][m]), acc[n][m])
//
// Groups shorter than a tile have tiles of their own with zeros beside them: scales take longer than the tile
// unit then. Integers with factors do not fit into a byte: they are two digits, 128 high + low, of a tile
// each. Included inside a target's namespace, after panels-inl.h of products/int8.

inline constexpr uint32_t kTilesFromRows = 9;
inline constexpr size_t kTileColumns = 64, kGroupTiles = kGroupRows / kTileRows;

inline size_t block_panels_bytes(uint32_t m, uint32_t k) {
  if (m < kTilesFromRows) return 0;
  return round_up(m, kPanelColumns) * (round_up(k, kMostBlock) + kTileColumns) + kCacheLine;
}

// Panels of 16 rows, the last as wide as its rows: [quads][rows][4].
inline Operand pack_blocks(const Operand& rows, uint32_t block, std::byte* panels) {
  if (rows.rows < kTilesFromRows) return rows;
  const BlockRowLayout layout(rows.k, block);
  for (uint32_t m = 0; m < rows.rows; m += kPanelColumns) {
    const uint32_t width = rows.rows - m < kPanelColumns ? rows.rows - m : kPanelColumns;
    int32_t index[kPanelColumns];
    for (uint32_t i = 0; i < width; ++i)
      index[i] = rows.index ? rows.index[m + i] : static_cast<int32_t>(m + i);
    // As if codes were half as many numbers of bf16.
    const RowsView codes{reinterpret_cast<const bf16*>(rows.data), rows.stride_bytes / sizeof(bf16), index};
    pack_panel(codes, 0, width, layout.padded / 2, panels + size_t{m} * layout.padded);
  }
  Operand packed = rows;
  packed.panels = panels;
  return packed;
}

// A block of K of 32 weight rows: tiles of codes, and what is applied to their sums.
template <class Format>
struct WeightTiles {
  using Of = Integers<Format>;
  static constexpr size_t kTileGroup = Of::kGroup < kTileColumns ? Of::kGroup : kTileColumns;
  static constexpr size_t kTiles = Of::kBlock / kTileGroup, kDigits = Of::kHasFactors ? 2 : 1;
  static constexpr size_t kTilesOfGroup = Of::kGroup / kTileGroup;

  alignas(kCacheLine) int8_t codes[kDigits][kTiles][kGroupTiles][kTileRows][kTileColumns] = {};
  alignas(kCacheLine) float scale[Of::kBlock / Of::kGroup][kGroupRows],
      offset[Of::kBlock / Of::kGroup][kGroupRows];
  alignas(kCacheLine) int16_t offset_pairs[kGroupRows][16];

  // Columns [at, at + columns) of rows [8 e, 8 e + 8).
  void decode(const EightRows& rows, size_t e, size_t at, size_t columns) {
    for (int r = 0; r < 8; ++r) decode_row(rows, r, 8 * e + static_cast<size_t>(r), at, columns);
    const auto scales = Of::open(rows, at / Of::kGroup);
    for (size_t g = 0; g < div_up(columns, Of::kGroup); ++g) {
      store_8(scale[g] + 8 * e, scales.scale(g));
      if constexpr (Of::kHasOffset) store_8(offset[g] + 8 * e, Of::offsets(rows, at / Of::kGroup + g));
    }
  }

 private:
  void decode_row(const EightRows& rows, int r, size_t n, size_t at, size_t columns) {
    if constexpr (!Of::kHasFactors) {
      for (size_t k = 0; k < Of::kBlock; k += 32)
        store(k, n, k < columns ? minus(Of::codes(rows, r, at + k), Of::kBias) : zero_bytes());
    } else {
      formats::GroupNumbers numbers;
      Format::group_numbers(Of::block(rows.row(r), at), numbers);
      const GroupFactors factors = group_factors<Format::kGroups>(numbers.scale);
      if constexpr (Of::kHasOffset)
        store_words(reinterpret_cast<std::byte*>(offset_pairs[n]),
                    group_words<Format::kGroups>(numbers.offset));
      KT_UNROLL for (size_t t = 0; t < kTiles; ++t) {
        const size_t k = at + t * kTileColumns;
        const Bytes32 integers[2] = {minus(Of::codes(rows, r, k), Of::kBias),
                                     minus(Of::codes(rows, r, k + 32), Of::kBias)};
        store_digits<Format::kGroups>(integers, factors, t, row_of_tile(0, t, n), row_of_tile(1, t, n));
      }
    }
  }
  std::byte* row_of_tile(size_t digit, size_t tile, size_t n) {
    return reinterpret_cast<std::byte*>(codes[digit][tile][n / kTileRows][n % kTileRows]);
  }
  void store(size_t k, size_t n, const Bytes32& codes_of_32) {
    const auto place = [&](size_t column) {
      return row_of_tile(0, column / kTileGroup, n) + column % kTileGroup;
    };
    if constexpr (kTileGroup < 32) {
      alignas(32) std::byte both[32];
      store_32(both, codes_of_32);
      std::memcpy(place(k), both, 16), std::memcpy(place(k + 16), both + 16, 16);
    } else {
      store_32(place(k), codes_of_32);
    }
  }
};

// What 16 rows of activations, or the last ones, bring to the sums of a block.
template <class Format>
struct PanelOfX {
  using Of = Integers<Format>;
  alignas(kCacheLine) float scale[kPanelColumns] = {};
  // Sums of codes: of groups, or in pairs of groups that have factors.
  alignas(kCacheLine) float sum[Of::kBlock / Of::kGroup][kPanelColumns] = {};
  alignas(kCacheLine) int16_t pairs[8][kPanelColumns][2] = {};

  PanelOfX(const NtArgs& args, uint32_t m, uint32_t width, const BlockRowLayout& layout, size_t at) {
    for (uint32_t i = 0; i < width; ++i) {
      const BlockRow x = block_row(args, m + i, layout);
      scale[i] = x.scales[at / Of::kBlock];
      if constexpr (!Of::kHasOffset) continue;
      if constexpr (Of::kHasFactors) {
        const int16_t* sums = Format::kGroups == 16 ? x.sums16 + at / 16 : x.sums32 + at / 32;
        for (size_t g = 0; g < Format::kGroups; ++g) pairs[g / 2][i][g % 2] = sums[g];
      } else {
        for (size_t k = 0; k < Of::kBlock; k += 16)
          sum[k / Of::kGroup][i] += static_cast<float>(x.sums16[(at + k) / 16]);
      }
    }
  }
};

// Sums of a group: [digit][output][row of activations].
using GroupTileSums = int32_t[2][kGroupRows][kPanelColumns];

template <class Format>
KT_INLINE void dot_group_of_tiles(const WeightTiles<Format>& w, const std::byte* x, ptrdiff_t width, size_t g,
                                  GroupTileSums& sums) {
  using Tiles = WeightTiles<Format>;
  const ptrdiff_t stride = width * 4;
  Tile::zero<0>(), Tile::zero<2>();
  if constexpr (Tiles::kDigits == 2) Tile::zero<1>(), Tile::zero<3>();
  for (size_t t = g * Tiles::kTilesOfGroup; t < (g + 1) * Tiles::kTilesOfGroup; ++t) {
    Tile::load<6>(x + static_cast<ptrdiff_t>(t * Tiles::kTileGroup) * width, stride);
    Tile::load<4>(w.codes[0][t][0], kTileColumns);
    Tile::load<5>(w.codes[0][t][1], kTileColumns);
    Tile::dot_int8<0, 4, 6>();
    Tile::dot_int8<2, 5, 6>();
    if constexpr (Tiles::kDigits == 2) {
      Tile::load<4>(w.codes[1][t][0], kTileColumns);
      Tile::load<5>(w.codes[1][t][1], kTileColumns);
      Tile::dot_int8<1, 4, 6>();
      Tile::dot_int8<3, 5, 6>();
    }
  }
  constexpr ptrdiff_t kRow = kPanelColumns * sizeof(int32_t);
  Tile::store<0>(sums[0][0], kRow);
  Tile::store<2>(sums[0][kTileRows], kRow);
  if constexpr (Tiles::kDigits == 2)
    Tile::store<1>(sums[1][0], kRow), Tile::store<3>(sums[1][kTileRows], kRow);
}

template <class Format>
KT_INLINE void add_scaled(const WeightTiles<Format>& w, const PanelOfX<Format>& x, const GroupTileSums& sums,
                          size_t g, float* acc) {
  using Of = Integers<Format>;
  for (size_t n = 0; n < kGroupRows; ++n, acc += kPanelColumns) {
    KT_UNROLL for (size_t m = 0; m < kPanelColumns; m += PanelVec::kLanes) {
      PanelVec::Ints sum = PanelVec::load(sums[0][n] + m);
      if constexpr (Of::kHasFactors)
        sum = PanelVec::add_product(PanelVec::load(sums[1][n] + m), sum, PanelVec::set(128));
      const PanelVec::Floats scale_of_x = PanelVec::load_f(x.scale + m);
      const auto scale = PanelVec::mul(PanelVec::set_f(w.scale[g][n]), scale_of_x);
      PanelVec::Floats total = PanelVec::fma(scale, PanelVec::floats(sum), PanelVec::load_f(acc + m));
      if constexpr (Of::kHasOffset) {
        if constexpr (Of::kHasFactors) {
          PanelVec::Ints of_x = PanelVec::zero();
          for (size_t pair = 0; pair < Format::kGroups / 2; ++pair)
            of_x = PanelVec::dot_words(of_x, PanelVec::broadcast(w.offset_pairs[n] + 2 * pair),
                                       PanelVec::load(x.pairs[pair][m]));
          const auto offset = PanelVec::mul(PanelVec::set_f(-w.offset[g][n]), scale_of_x);
          total = PanelVec::fma(offset, PanelVec::floats(of_x), total);
        } else {
          const auto offset = PanelVec::mul(PanelVec::set_f(w.offset[g][n]), scale_of_x);
          total = PanelVec::fma(offset, PanelVec::load_f(x.sum[g] + m), total);
        }
      }
      PanelVec::store_f(acc + m, total);
    }
  }
}

// 32 outputs, of which `outputs` says which they are.
template <class Format>
void int8_tile_group(const NtArgs& args, TileScope& scope, const EightOutputs (&outputs)[kGroupRows / 8],
                     float* sums) {
  using Of = Integers<Format>;
  const size_t k = args.x.k;
  const BlockRowLayout layout(args.x.k, Of::kBlock);
  constexpr size_t kPanelFloats = size_t{kGroupRows} * kPanelColumns;
  std::memset(sums, 0, div_up(args.x.rows, kPanelColumns) * kPanelFloats * sizeof(float));
  WeightTiles<Format> weights;
  for (size_t at = 0; at < k; at += Of::kBlock) {
    const size_t columns = k - at < Of::kBlock ? k - at : Of::kBlock;
    for (size_t e = 0; e < kGroupRows / 8; ++e) {
      if (BlockFormat<Format> || columns == Of::kBlock) {
        weights.decode(outputs[e].rows, e, at, columns);
      } else if constexpr (!BlockFormat<Format>) {
        RestOfRows<Format> rest;
        rest.copy(outputs[e].rows, at, k);
        weights.decode(rest.rows, e, 0, columns);
      }
      EightRows ahead = outputs[e].rows;
      const size_t next = at + Of::kBlock;
      if (next >= k) ahead.data += static_cast<ptrdiff_t>(kGroupRows) * ahead.stride;
      prefetch_block<Format>(ahead, next < k ? next : 0);
    }
    for (uint32_t m = 0; m < args.x.rows; m += kPanelColumns) {
      const uint32_t width = panel_width(args.x, m / kPanelColumns);
      const PanelOfX<Format> x(args, m, width, layout, at);
      scope.use(width, width);
      const std::byte* codes = args.x.panels + size_t{m} * layout.padded + at * width;
      for (size_t g = 0; g < div_up(columns, Of::kGroup); ++g) {
        alignas(kCacheLine) GroupTileSums group;
        dot_group_of_tiles(weights, codes, width, g, group);
        add_scaled(weights, x, group, g, sums + m / kPanelColumns * kPanelFloats);
      }
    }
  }
}

// To C, whose rows are outputs, as wide as the panel.
template <class Format>
void store_panels(const NtArgs& args, const EightOutputs (&outputs)[kGroupRows / 8], const float* sums) {
  for (uint32_t m = 0; m < args.x.rows; m += kPanelColumns, sums += size_t{kGroupRows} * kPanelColumns) {
    const uint32_t width = panel_width(args.x, m / kPanelColumns);
    float* c = args.c + size_t{m} * tile_n_padded(args.n1 - args.n0);
    for (size_t e = 0; e < kGroupRows / 8; ++e) {
      for (uint32_t i = 0; i < outputs[e].count; ++i) {
        const float* row = sums + (8 * e + outputs[e].first + i) * kPanelColumns;
        const uint32_t n = outputs[e].n + i;
        const float scale = Integers<Format>::kScalesSums ? args.w.channel_scale[n] : 1.0f;
        float* to = c + (n - args.n0) * width;
        for (uint32_t j = 0; j < width; ++j) to[j] = Integers<Format>::kScalesSums ? scale * row[j] : row[j];
      }
    }
  }
}

template <class Format>
void int8_tiles(const NtArgs& args) {
  alignas(kCacheLine) float sums[kMaxCallRows * kGroupRows];
  TileScope scope;
  for (uint32_t n = args.n0; n < args.n1;) {
    EightOutputs outputs[kGroupRows / 8];
    for (EightOutputs& of : outputs) {
      of = next_eight<Format>(args, n < args.n1 ? n : args.n1 - 1);
      if (n >= args.n1) of.count = 0;
      n += of.count;
    }
    int8_tile_group<Format>(args, scope, outputs, sums);
    store_panels<Format>(args, outputs, sums);
  }
}
