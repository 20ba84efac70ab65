// Activations in int8 as the tile unit takes them: blocks of K of 16 rows, four codes of each side by side,
// with their scales and sums. Included inside a target's namespace, after its layouts.

inline constexpr uint32_t kTilesFromRows = 5;
inline constexpr size_t kTileColumns = 64;

// A block of K of 16 rows of activations; rows beyond the last repeat it.
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
