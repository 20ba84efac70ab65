// Everything but the product for the tile kernels: operands are K-paired panels of 16 rows, C blocks are
// transposed. Included inside a target's namespace, after nt_tiles.h and activation.h.
//
// A panel of w rows: [K/32][16 pairs][w][2] bf16; w is 16 but for the last panel, which is only as wide as
// its rows: a single row is thus stored as it is, and decoding reads no padding.

KT_INLINE size_t panel_bytes(uint32_t k) { return round_up(k, kTileK) * kPanelColumns * sizeof(bf16); }

// A vector store may reach beyond a narrow last panel.
inline size_t operand_bytes_tiles(uint32_t m, uint32_t k) {
  return div_up(m, kPanelColumns) * panel_bytes(k) + kCacheLine;
}

inline Operand operand_block_tiles(std::byte* data, uint32_t, uint32_t k, uint32_t m0, uint32_t m1) {
  return Operand{data + m0 / kPanelColumns * panel_bytes(k), panel_bytes(k), nullptr, m1 - m0, k};
}

// Sixteen (or fewer) rows of dwords become columns: to[pair * width + m] = row[m][pair], for 16 pairs.
KT_INLINE void pack_step(const std::byte* const* row, size_t at, size_t bytes, uint32_t width, uint32_t* to) {
  uint32_t block[kPanelColumns][kTileK / 2] = {};
  for (uint32_t m = 0; m < kPanelColumns && m < width; ++m) std::memcpy(block[m], row[m] + at, bytes);
  for (uint32_t pair = 0; pair < kTileK / 2; ++pair)
    for (uint32_t m = 0; m < width; ++m) to[pair * width + m] = block[m][pair];
}

inline void pack_panel(const RowsView& rows, uint32_t m0, uint32_t width, uint32_t k, std::byte* to) {
  const std::byte* row[kPanelColumns];
  for (uint32_t m = 0; m < width; ++m) {
    const size_t index = rows.index ? rows.index[m0 + m] : m0 + m;
    row[m] = reinterpret_cast<const std::byte*>(rows.data + index * rows.stride);
  }
  uint32_t* dwords = reinterpret_cast<uint32_t*>(to);
  const size_t row_bytes = k * sizeof(bf16);
  constexpr size_t kStepBytes = kTileK * sizeof(bf16);
  for (size_t at = 0; at < row_bytes; at += kStepBytes, dwords += kTileK / 2 * width) {
    const size_t left = row_bytes - at;
    if (left < kStepBytes) {
      pack_step(row, at, left, width, dwords);
    } else if (width == kPanelColumns) {
      transpose_dwords(row, at, dwords);
    } else {
      pack_step(row, at, kStepBytes, width, dwords);
    }
  }
}

inline Operand pack_tiles(const RowsView& rows, uint32_t m, uint32_t k, std::byte* data) {
  if (m == 1 && k % kTileK == 0) {  // a row is its own panel
    const size_t index = rows.index ? rows.index[0] : 0;
    const bf16* row = rows.data + index * rows.stride;
    return Operand{reinterpret_cast<const std::byte*>(row), panel_bytes(k), nullptr, m, k};
  }
  for (uint32_t m0 = 0; m0 < m; m0 += kPanelColumns) {
    const uint32_t width = m - m0 < kPanelColumns ? m - m0 : kPanelColumns;
    pack_panel(rows, m0, width, k, data + m0 / kPanelColumns * panel_bytes(k));
  }
  return Operand{data, panel_bytes(k), nullptr, m, k};
}

// Two rows of C, outputs n and n + 1 of a panel's tokens, are one row of pairs of the operand.
template <class Map>
struct ActivateTiles {
  static KT_INLINE Float value(const ActivateArgs& a, size_t at, uint32_t n) {
    const Float g = Vec::add(Vec::load_f(a.c_gate + at), Vec::set(a.gate_bias ? a.gate_bias[n] : 0.0f));
    if (a.c_up == nullptr) return Map::apply(a.activation, g, g);
    const Float u = Vec::add(Vec::load_f(a.c_up + at), Vec::set(a.up_bias ? a.up_bias[n] : 0.0f));
    return Map::apply(a.activation, g, u);
  }

  // Tokens [m, m + kWidth) of pair n, n + 1; the odd one is zero behind the last output.
  static KT_INLINE void pair(const ActivateArgs& a, size_t c_row, uint32_t n, uint32_t m, uint32_t width,
                             bf16* to) {
    const size_t at = (c_row + n) * kPanelColumns + m;
    const bool has_odd = n + 1 < a.n1 - a.n0;
    const Float even = value(a, at, n);
    const Float odd = has_odd ? value(a, at + kPanelColumns, n + 1) : Vec::set(0.0f);
    const uint32_t count = width - m < Vec::kWidth ? width - m : static_cast<uint32_t>(Vec::kWidth);
    if (count == Vec::kWidth) return Vec::store_bf16_pairs(to + 2 * m, even, odd);
    bf16 full[2 * Vec::kWidth];
    Vec::store_bf16_pairs(full, even, odd);
    std::memcpy(to + 2 * m, full, count * 2 * sizeof(bf16));
  }

  static void run(const ActivateArgs& a) {
    const uint32_t n_padded = tile_n_padded(a.n1 - a.n0);
    const uint32_t last_pair = a.n1 == a.h.k ? static_cast<uint32_t>(round_up(a.n1, kTileK)) : a.n1;
    for (uint32_t p = 0; p * kPanelColumns < a.h.rows; ++p) {
      const uint32_t width = panel_width(a.h, p);
      bf16* panel = reinterpret_cast<bf16*>(const_cast<std::byte*>(a.h.data) + p * a.h.stride_bytes);
      for (uint32_t n = a.n0; n < last_pair; n += 2) {
        bf16* to = panel + size_t{n} * width;
        if (n >= a.n1) {
          std::memset(to, 0, width * 2 * sizeof(bf16));
          continue;
        }
        for (uint32_t m = 0; m < width; m += Vec::kWidth)
          pair(a, size_t{p} * n_padded, n - a.n0, m, width, to);
      }
    }
  }
};

inline void activate_tiles(const ActivateArgs& args) { for_activation<ActivateTiles>(args); }

inline void store_rows_tiles(const StoreRowsArgs& a) {
  const uint32_t n_padded = tile_n_padded(a.n);
  for (uint32_t m = 0; m < a.m; m += kPanelColumns) {
    const float* c = a.c + size_t{m} * n_padded;
    const uint32_t width = a.m - m < kPanelColumns ? a.m - m : kPanelColumns;
    uint32_t n = 0;
    if (width == kPanelColumns) {
      const std::byte* row[kPanelColumns];
      alignas(64) float block[kPanelColumns][kPanelColumns];
      for (; n + kPanelColumns <= a.n; n += kPanelColumns) {
        for (uint32_t i = 0; i < kPanelColumns; ++i)
          row[i] = reinterpret_cast<const std::byte*>(c + (n + i) * kPanelColumns);
        transpose_dwords(row, 0, reinterpret_cast<uint32_t*>(block));
        for (uint32_t i = 0; i < kPanelColumns; ++i) {
          float* y = a.y + (m + i) * a.y_stride + n;
          for (uint32_t j = 0; j < kPanelColumns; ++j) y[j] = block[i][j] + (a.bias ? a.bias[n + j] : 0.0f);
        }
      }
    }
    for (; n < a.n; ++n)
      for (uint32_t i = 0; i < width; ++i)
        a.y[(m + i) * a.y_stride + n] = c[n * kPanelColumns + i] + (a.bias ? a.bias[n] : 0.0f);
  }
}
