// Products of encoded weights with many rows of activations in int8 on the tile unit (contract_int8.h).
//
// A block of K of 32 weight rows is decoded to tiles of signed bytes, and multiplied with panels of 16 rows
// of activations, four codes of each side by side. A tile of sums is 16 outputs x 16 rows of activations, to
// which the scales of both are applied on vectors:
//
//   acc[n][m] = fma(w_s[n] s_b[m], float(S[n][m]), acc[n][m])
//
// A tile is as wide as the group of weights that shares a scale, at most 64 columns: for groups of 16 or 32,
// scales take longer than the tile unit. Integers with factors do not fit into a byte: they are two digits,
// 128 high + low, of a tile each.
// Included inside a target's namespace, after panels-inl.h of products/int8.

inline constexpr uint32_t kTilesFromRows = 9;
inline constexpr size_t kTileColumns = 64, kGroupTiles = kGroupRows / kTileRows;

// ---- activations ----

// A block of K of 16 rows of activations; rows beyond the last are it again.
template <size_t kBlock>
struct PanelBlock {
  alignas(kCacheLine) float scale[kPanelColumns];
  // Sums of 32 and of 16 codes, in pairs.
  alignas(kCacheLine) int16_t sums32[kBlock / 64][kPanelColumns][2];
  alignas(kCacheLine) int16_t sums16[kBlock / 32][kPanelColumns][2];
  alignas(kCacheLine) std::byte codes[kBlock / 4][kPanelColumns][4];

  static size_t count(uint32_t m, uint32_t k) { return div_up(m, kPanelColumns) * div_up(k, kBlock); }

  void fill(const BlockRow (&rows)[kPanelColumns], size_t block) {
    const auto copy_pairs = [&](auto& to, size_t row, const int16_t* sums) {
      for (size_t pair = 0; pair < std::size(to); ++pair) std::memcpy(to[pair][row], sums + 2 * pair, 4);
    };
    for (size_t row = 0; row < kPanelColumns; ++row) {
      scale[row] = rows[row].scales[block];
      copy_pairs(sums32, row, rows[row].sums32 + block * kBlock / 32);
      copy_pairs(sums16, row, rows[row].sums16 + block * kBlock / 16);
    }
    for (size_t k = 0; k < kBlock; k += kTileColumns) {
      const std::byte* of_row[kPanelColumns];
      for (size_t row = 0; row < kPanelColumns; ++row) of_row[row] = rows[row].codes + block * kBlock + k;
      transpose_dwords(of_row, 0, reinterpret_cast<uint32_t*>(codes[k / 4]));
    }
  }
};

template <size_t kBlock>
void pack_panel_blocks(const Operand& rows, std::byte* panels) {
  const BlockRowLayout layout(rows.k, kBlock);
  auto* to = reinterpret_cast<PanelBlock<kBlock>*>(panels);
  for (uint32_t m = 0; m < rows.rows; m += kPanelColumns) {
    BlockRow of_panel[kPanelColumns];
    for (uint32_t i = 0; i < kPanelColumns; ++i) {
      const uint32_t at = m + i < rows.rows ? m + i : rows.rows - 1;
      const size_t row = rows.index ? static_cast<size_t>(rows.index[at]) : at;
      of_panel[i] = BlockRow(rows.data + row * rows.stride_bytes, layout);
    }
    for (size_t block = 0; block < layout.padded / kBlock; ++block) (to++)->fill(of_panel, block);
  }
}

inline size_t block_panels_bytes(uint32_t m, uint32_t k) {
  if (m < kTilesFromRows) return 0;
  const size_t by_128 = PanelBlock<128>::count(m, k) * sizeof(PanelBlock<128>),
               by_256 = PanelBlock<256>::count(m, k) * sizeof(PanelBlock<256>);
  return by_128 > by_256 ? by_128 : by_256;
}

inline Operand pack_blocks(const Operand& rows, uint32_t block, std::byte* panels) {
  if (rows.rows < kTilesFromRows) return rows;
  if (block == 256) {
    pack_panel_blocks<256>(rows, panels);
  } else {
    pack_panel_blocks<128>(rows, panels);
  }
  Operand packed = rows;
  packed.panels = panels;
  return packed;
}

// ---- weights ----

// A block of K of 32 weight rows: tiles of codes, and what is applied to their sums.
template <class Format>
struct WeightTiles {
  using Of = Integers<Format>;
  static constexpr size_t kColumns = Of::kGroup < kTileColumns ? Of::kGroup : kTileColumns;
  static constexpr size_t kTiles = Of::kBlock / kColumns, kDigits = Of::kHasFactors ? 2 : 1;
  static constexpr size_t kTilesOfGroup = Of::kGroup / kColumns;

  alignas(kCacheLine) std::byte codes[kDigits][kTiles][kGroupTiles][kTileRows][kColumns];
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
    return codes[digit][tile][n / kTileRows][n % kTileRows];
  }
  void store(size_t k, size_t n, const Bytes32& codes_of_32) {
    if constexpr (kColumns < 32) {
      alignas(32) std::byte both[32];
      store_32(both, codes_of_32);
      std::memcpy(row_of_tile(0, k / 16, n), both, 16);
      std::memcpy(row_of_tile(0, k / 16 + 1, n), both + 16, 16);
    } else {
      store_32(row_of_tile(0, k / kColumns, n) + k % kColumns, codes_of_32);
    }
  }
};

// ---- products ----

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

// Sums of a group: [digit][output][row of activations].
using GroupTileSums = int32_t[2][kGroupRows][kPanelColumns];

template <class Format>
KT_INLINE void dot_group_of_tiles(const WeightTiles<Format>& w, const PanelBlock<Integers<Format>::kBlock>& x,
                                  size_t g, GroupTileSums& sums) {
  using Tiles = WeightTiles<Format>;
  constexpr ptrdiff_t kXRow = sizeof x.codes[0], kWRow = Tiles::kColumns, kRow = sizeof sums[0][0];
  Tile::zero<0>(), Tile::zero<2>();
  if constexpr (Tiles::kDigits == 2) Tile::zero<1>(), Tile::zero<3>();
  for (size_t t = g * Tiles::kTilesOfGroup; t < (g + 1) * Tiles::kTilesOfGroup; ++t) {
    Tile::load<6>(x.codes[t * Tiles::kColumns / 4], kXRow);
    Tile::load<4>(w.codes[0][t][0], kWRow);
    Tile::load<5>(w.codes[0][t][1], kWRow);
    Tile::dot_int8<0, 4, 6>();
    Tile::dot_int8<2, 5, 6>();
    if constexpr (Tiles::kDigits == 2) {
      Tile::load<4>(w.codes[1][t][0], kWRow);
      Tile::load<5>(w.codes[1][t][1], kWRow);
      Tile::dot_int8<1, 4, 6>();
      Tile::dot_int8<3, 5, 6>();
    }
  }
  Tile::store<0>(sums[0][0], kRow);
  Tile::store<2>(sums[0][kTileRows], kRow);
  if constexpr (Tiles::kDigits == 2) {
    Tile::store<1>(sums[1][0], kRow);
    Tile::store<3>(sums[1][kTileRows], kRow);
  }
}

// Sums of the codes of a group, of 16 rows of activations.
template <class Format, size_t kBlock>
KT_INLINE PanelVec::Floats group_sums(const PanelBlock<kBlock>& x, size_t g, size_t m) {
  static_assert(Integers<Format>::kGroup == 32);
  const PanelVec::Ints pairs = PanelVec::load(x.sums32[g / 2][m]);
  return PanelVec::floats(g % 2 == 0 ? PanelVec::low_words(pairs) : PanelVec::high_words(pairs));
}

template <class Format>
KT_INLINE void add_scaled(const WeightTiles<Format>& w, const PanelBlock<Integers<Format>::kBlock>& x,
                          const GroupTileSums& sums, size_t g, float* acc) {
  using Of = Integers<Format>;
  for (size_t n = 0; n < kGroupRows; ++n, acc += kPanelColumns) {
    KT_UNROLL for (size_t m = 0; m < kPanelColumns; m += PanelVec::kLanes) {
      PanelVec::Ints sum = PanelVec::load(sums[0][n] + m);
      if constexpr (Of::kHasFactors)
        sum = PanelVec::add(PanelVec::shifted<7>(sum), PanelVec::load(sums[1][n] + m));
      const PanelVec::Floats scale_of_x = PanelVec::load_f(x.scale + m);
      const auto scale = PanelVec::mul(PanelVec::set_f(w.scale[g][n]), scale_of_x);
      PanelVec::Floats total = PanelVec::fma(scale, PanelVec::floats(sum), PanelVec::load_f(acc + m));
      if constexpr (Of::kHasOffset && Of::kHasFactors) {
        PanelVec::Ints of_x = PanelVec::zero();
        KT_UNROLL for (size_t pair = 0; pair < Format::kGroups / 2; ++pair) {
          const auto* pairs = Format::kGroups == 16 ? x.sums16[pair] : x.sums32[pair];
          of_x = PanelVec::dot_words(of_x, PanelVec::broadcast(w.offset_pairs[n] + 2 * pair),
                                     PanelVec::load(pairs[m]));
        }
        const auto offset = PanelVec::mul(PanelVec::set_f(-w.offset[g][n]), scale_of_x);
        total = PanelVec::fma(offset, PanelVec::floats(of_x), total);
      } else if constexpr (Of::kHasOffset) {
        const auto offset = PanelVec::mul(PanelVec::set_f(w.offset[g][n]), scale_of_x);
        total = PanelVec::fma(offset, group_sums<Format>(x, g, m), total);
      }
      PanelVec::store_f(acc + m, total);
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
      for (size_t g = 0; g < div_up(columns, Of::kGroup); ++g) {
        alignas(kCacheLine) GroupTileSums group;
        dot_group_of_tiles(weights, of_panel, g, group);
        add_scaled(weights, of_panel, group, g, sums + panel * kPanelFloats);
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
