// Everything but the product for the tile kernels: operands are K-paired panels of 16 rows, C blocks are
// transposed. Included inside a target's namespace, after panels-inl.h and activation-inl.h.

// A vector store may reach beyond a narrow last panel.
inline size_t operand_bytes(uint32_t m, uint32_t k) {
  return div_up(m, kPanelColumns) * panel_bytes(k) + kCacheLine;
}

inline Operand operand_block(std::byte* data, uint32_t, uint32_t k, uint32_t m0, uint32_t m1) {
  return Operand{data + m0 / kPanelColumns * panel_bytes(k), panel_bytes(k), nullptr, m1 - m0, k};
}

// Sixteen (or fewer) rows of dwords become columns: to[pair * width + m] = row[m][pair], for 16 pairs.
KT_INLINE void pack_step(const std::byte* const* row, size_t at, size_t bytes, uint32_t width, uint32_t* to) {
  uint32_t block[kPanelColumns][kTileK / 2] = {};
  for (uint32_t m = 0; m < kPanelColumns; ++m) {
    if (m < width) std::memcpy(block[m], row[m] + at, bytes);
  }
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

inline Operand pack(const RowsView& rows, uint32_t m, uint32_t k, std::byte* data) {
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

// Rows of codes are packed as if they were rows of half as many bf16.
KT_INLINE uint32_t int8_as_bf16(uint32_t k) {
  return static_cast<uint32_t>(Int8Rows::stride_of(k) / sizeof(bf16));
}

inline size_t int8_operand_bytes(uint32_t m, uint32_t k) { return operand_bytes(m, int8_as_bf16(k)); }

inline Operand pack_int8(const Int8Rows& rows, const int32_t* index, uint32_t m, uint32_t k,
                         std::byte* data) {
  const RowsView codes{reinterpret_cast<const bf16*>(rows.codes), int8_as_bf16(k), index};
  Operand packed = pack(codes, m, int8_as_bf16(k), data);
  packed.index = index, packed.k = k, packed.quantized = rows.row;
  return packed;
}

// Up to 32 outputs of a panel's tokens on their way to rows: a row of 16 dwords is a pair of outputs in bf16
// or one in fp32, so that both leave by the same transposition.
struct LeavingOutputs {
  static constexpr uint32_t kOutputs = 32;
  alignas(64) std::byte bytes[kOutputs * kPanelColumns * sizeof(float)];

  KT_INLINE std::byte* row(uint32_t i) { return bytes + i * kPanelColumns * sizeof(uint32_t); }

  // Outputs i, even, and i + 1 of tokens m and behind.
  KT_INLINE void put(FloatType type, uint32_t i, uint32_t m, const Float& even, const Float& odd) {
    if (type == FloatType::kBf16) {
      Vec::store_bf16_pairs(reinterpret_cast<bf16*>(row(i / 2)) + 2 * m, even, odd);
    } else {
      Vec::store_f(reinterpret_cast<float*>(row(i)) + m, even);
      Vec::store_f(reinterpret_cast<float*>(row(i + 1)) + m, odd);
    }
  }

  // The first `count` outputs of `width` tokens, to rows from element `at` on.
  void write(void* rows, FloatType type, size_t at, size_t stride, uint32_t width, uint32_t count) {
    const size_t size = size_of(type);
    std::byte* to = static_cast<std::byte*>(rows) + at * size;
    const std::byte* from[kPanelColumns];
    alignas(64) uint32_t turned[kPanelColumns][kPanelColumns];
    for (uint32_t first = 0; count * size > first * sizeof(uint32_t); first += kPanelColumns) {
      for (uint32_t i = 0; i < kPanelColumns; ++i) from[i] = row(first + i);
      transpose_dwords(from, 0, turned[0]);
      const size_t left = count * size - first * sizeof(uint32_t);
      for (uint32_t m = 0; m < width; ++m) {
        std::byte* line = to + m * stride * size + first * sizeof(uint32_t);
        if (left >= sizeof turned[m]) {
          std::memcpy(line, turned[m], sizeof turned[m]);
        } else {
          std::memcpy(line, turned[m], left);
        }
      }
    }
  }
};

// Two rows of C, outputs n and n + 1 of a panel's tokens, are one row of pairs of the operand.
template <class Map>
struct ActivateTiles {
  static KT_INLINE Float value(const ActivateArgs& a, size_t at, Float gate_bias, Float up_bias) {
    const Float g = Vec::add(Vec::load_f(a.c_gate + at), gate_bias);
    if (a.c_up == nullptr) return Map::apply(a.activation, g, g);
    return Map::apply(a.activation, g, Vec::add(Vec::load_f(a.c_up + at), up_bias));
  }
  static KT_INLINE Float bias(const float* values, uint32_t n) { return Vec::set(values ? values[n] : 0.0f); }

  static void full_panel(const ActivateArgs& a, size_t c, bf16* to) {
    for (uint32_t n = 0; n < a.n1 - a.n0; n += 2, c += 2 * kPanelColumns, to += 2 * kPanelColumns) {
      const bool has_odd = n + 1 < a.n1 - a.n0;
      const Float gate0 = bias(a.gate_bias, n), up0 = bias(a.up_bias, n);
      const Float gate1 = has_odd ? bias(a.gate_bias, n + 1) : gate0;
      const Float up1 = has_odd ? bias(a.up_bias, n + 1) : up0;
      for (uint32_t m = 0; m < kPanelColumns; m += Vec::kWidth) {
        const Float even = value(a, c + m, gate0, up0);
        const Float odd = has_odd ? value(a, c + kPanelColumns + m, gate1, up1) : Vec::set(0.0f);
        Vec::store_bf16_pairs(to + 2 * m, even, odd);
      }
    }
  }

  // C of a narrow panel has no gaps, so vectors span its rows: one token costs a sixteenth of a full
  // panel.
  static void narrow_panel(const ActivateArgs& a, size_t c, uint32_t width, bf16* to) {
    constexpr uint32_t kRows = 16;  // outputs at a time: even, and whole vectors for any width
    static_assert(kRows % Vec::kWidth == 0);
    alignas(64) float gate_bias[kRows * kPanelColumns], up_bias[kRows * kPanelColumns];
    alignas(64) float h[(kRows + 1) * kPanelColumns + Vec::kWidth];
    const uint32_t outputs = a.n1 - a.n0;
    bf16* const end = to + round_up(outputs, 2) * width;
    for (uint32_t n = 0; n < outputs; n += kRows, c += kRows * width) {
      const uint32_t rows = outputs - n < kRows ? outputs - n : kRows;
      if (a.gate_bias) spread(a.gate_bias + n, rows, width, gate_bias);
      if (a.up_bias) spread(a.up_bias + n, rows, width, up_bias);
      for (uint32_t i = 0; i < rows * width; i += Vec::kWidth)
        Vec::store_f(h + i, value(a, c + i, a.gate_bias ? Vec::load_f(gate_bias + i) : Vec::set(0.0f),
                                  a.up_bias ? Vec::load_f(up_bias + i) : Vec::set(0.0f)));
      std::memset(h + rows * width, 0, width * sizeof(float));
      for (uint32_t r = 0; r < rows; r += 2) {
        const float *even = h + r * width, *odd = even + width;
        for (uint32_t m = 0; m < width; m += Vec::kWidth)
          store_pairs(even + m, odd + m, to + (n + r) * width + 2 * m, end);
      }
    }
  }

  static void spread(const float* bias, uint32_t rows, uint32_t width, float* to) {
    for (uint32_t r = 0; r < rows; ++r)
      for (uint32_t m = 0; m < width; ++m) *to++ = bias[r];
  }

  // A vector of pairs, which may reach into the pairs behind (they are written after it) but not beyond
  // `end`.
  static KT_INLINE void store_pairs(const float* even, const float* odd, bf16* to, bf16* end) {
    if (end - to >= ptrdiff_t{2 * Vec::kWidth})
      return Vec::store_bf16_pairs(to, Vec::load_f(even), Vec::load_f(odd));
    bf16 pairs[2 * Vec::kWidth];
    Vec::store_bf16_pairs(pairs, Vec::load_f(even), Vec::load_f(odd));
    std::memcpy(to, pairs, static_cast<size_t>(end - to) * sizeof(bf16));
  }

  // A row of a narrow panel is computed like a full one: the elements behind it in the C block are computed
  // too, and discarded.
  static void training_panel(const ActivateArgs& a, size_t c, uint32_t m0, uint32_t width, bf16* to) {
    const uint32_t outputs = a.n1 - a.n0;
    LeavingOutputs gate, up, h;
    for (uint32_t n = 0; n < outputs; n += LeavingOutputs::kOutputs, c += LeavingOutputs::kOutputs * width) {
      const uint32_t left = outputs - n,
                     count = left < LeavingOutputs::kOutputs ? left : LeavingOutputs::kOutputs;
      for (uint32_t i = 0; i < count; i += 2) {
        for (uint32_t m = 0; m < width; m += Vec::kWidth) {
          const Values even = values(a, c + i * width + m, n + i);
          const Values odd = i + 1 < count ? values(a, c + (i + 1) * width + m, n + i + 1)
                                           : Values{even.g, even.u, Vec::set(0.0f)};
          if (a.kept.gate) gate.put(a.kept.type, i, m, even.g, odd.g);
          if (a.kept.up) up.put(a.kept.type, i, m, even.u, odd.u);
          h.put(FloatType::kBf16, i, m, even.h, odd.h);
        }
        if (to) std::memcpy(to + (n + i) * width, h.row(i / 2), width * 2 * sizeof(bf16));
      }
      const size_t at = m0 * a.kept.stride + n;
      if (a.kept.gate) gate.write(a.kept.gate, a.kept.type, at, a.kept.stride, width, count);
      if (a.kept.up) up.write(a.kept.up, a.kept.type, at, a.kept.stride, width, count);
      if (a.kept.h) h.write(a.kept.h, FloatType::kBf16, at, a.kept.stride, width, count);
    }
  }

  struct Values {
    Float g, u, h;
  };
  static KT_INLINE Values values(const ActivateArgs& a, size_t at, uint32_t n) {
    const Float scale = Vec::set(a.lora_scale);
    const Float g = Vec::add(with_adapter(a.c_gate, a.l_gate, scale, at), bias(a.gate_bias, n));
    if (a.c_up == nullptr) return {g, g, Map::apply(a.activation, g, g)};
    const Float u = Vec::add(with_adapter(a.c_up, a.l_up, scale, at), bias(a.up_bias, n));
    return {g, u, Map::apply(a.activation, g, u)};
  }

  static void run(const ActivateArgs& a) {
    const bool plain = is_plain(a);
    const uint32_t n_padded = tile_n_padded(a.n1 - a.n0);
    const uint32_t end = static_cast<uint32_t>(round_up(a.n1, 2));
    const uint32_t padded = a.n1 == a.h.k ? static_cast<uint32_t>(round_up(a.n1, kTileK)) : end;
    for (uint32_t p = 0; p * kPanelColumns < a.h.rows; ++p) {
      const uint32_t width = panel_width(a.h, p);
      const size_t c = size_t{p} * n_padded * kPanelColumns;
      bf16* to = nullptr;
      if (a.h.data) {
        auto* panel = const_cast<std::byte*>(a.h.data) + p * a.h.stride_bytes;
        to = reinterpret_cast<bf16*>(panel) + size_t{a.n0} * width;
      }
      if (!plain) {
        training_panel(a, c, p * kPanelColumns, width, to);
      } else if (width == kPanelColumns) {
        full_panel(a, c, to);
      } else {
        narrow_panel(a, c, width, to);
      }
      if (to) std::memset(to + size_t{end - a.n0} * width, 0, (padded - end) * width * sizeof(bf16));
    }
  }
};

inline void activate(const ActivateArgs& args) { for_activation<ActivateTiles>(args); }

// Outputs of the panel that begins with row m0, in fp32 as they are but for the bias.
inline void store_panel(const StoreRowsArgs& a, const float* c, uint32_t m0, uint32_t width) {
  float* rows = static_cast<float*>(a.y) + m0 * a.y_stride;
  uint32_t n = 0;
  if (width == kPanelColumns) {
    const std::byte* row[kPanelColumns];
    for (; n + kPanelColumns <= a.n; n += kPanelColumns) {
      for (uint32_t i = 0; i < kPanelColumns; ++i)
        row[i] = reinterpret_cast<const std::byte*>(c + (n + i) * kPanelColumns);
      float* y = rows + n;
      transpose_dwords(row, 0, reinterpret_cast<uint32_t*>(y), a.y_stride);
      if (a.bias == nullptr) continue;
      for (uint32_t i = 0; i < kPanelColumns; ++i, y += a.y_stride)
        for (uint32_t j = 0; j < kPanelColumns; ++j) y[j] += a.bias[n + j];
    }
  }
  for (uint32_t i = 0; i < width; ++i) {
    float* y = rows + i * a.y_stride;
    for (uint32_t j = n; j < a.n; ++j) y[j] = c[j * width + i] + (a.bias ? a.bias[j] : 0.0f);
  }
}

KT_INLINE Float adapted_output(const StoreRowsArgs& a, size_t at, uint32_t n) {
  const Float y = with_adapter(a.c, a.l, Vec::set(a.lora_scale), at);
  return a.bias ? Vec::add(y, Vec::set(a.bias[n])) : y;
}

// The same with adapters or to bf16: added and rounded before they are turned. `c` is where the panel begins.
inline void store_adapted_panel(const StoreRowsArgs& a, size_t c, uint32_t m0, uint32_t width) {
  LeavingOutputs outputs;
  for (uint32_t n = 0; n < a.n; n += LeavingOutputs::kOutputs, c += LeavingOutputs::kOutputs * width) {
    const uint32_t left = a.n - n, count = left < LeavingOutputs::kOutputs ? left : LeavingOutputs::kOutputs;
    for (uint32_t i = 0; i < count; i += 2) {
      for (uint32_t m = 0; m < width; m += Vec::kWidth) {
        const Float even = adapted_output(a, c + i * width + m, n + i);
        const Float odd = i + 1 < count ? adapted_output(a, c + (i + 1) * width + m, n + i + 1) : even;
        outputs.put(a.y_type, i, m, even, odd);
      }
    }
    outputs.write(a.y, a.y_type, m0 * a.y_stride + n, a.y_stride, width, count);
  }
}

inline void store_rows(const StoreRowsArgs& a) {
  const uint32_t n_padded = tile_n_padded(a.n);
  const bool plain = a.l == nullptr && a.y_type == FloatType::kFloat32;
  for (uint32_t m = 0; m < a.m; m += kPanelColumns) {
    const uint32_t width = a.m - m < kPanelColumns ? a.m - m : kPanelColumns;
    if (plain) {
      store_panel(a, a.c + size_t{m} * n_padded, m, width);
    } else {
      store_adapted_panel(a, size_t{m} * n_padded, m, width);
    }
  }
}
