// Everything but the product for the rows-dot-rows kernels: operands are plain bf16 rows, C blocks are
// row-major. Included inside a target's namespace, after nt_rows-inl.h and activation-inl.h.

// Rows of an intermediate start on cache lines.
KT_INLINE size_t operand_stride(uint32_t k) { return round_up(k * sizeof(bf16), kCacheLine); }

inline size_t operand_bytes(uint32_t m, uint32_t k) { return m * operand_stride(k); }

inline Operand operand_block(std::byte* data, uint32_t, uint32_t k, uint32_t m0, uint32_t m1) {
  const size_t stride = operand_stride(k);
  return Operand{data + m0 * stride, stride, nullptr, m1 - m0, k};
}

// Every group of weights would read rows that straddle cache lines again, so they are copied once.
inline Operand pack(const RowsView& rows, uint32_t m, uint32_t k, std::byte* data) {
  const std::byte* source = reinterpret_cast<const std::byte*>(rows.data);
  const size_t source_stride = rows.stride * sizeof(bf16);
  if (is_aligned(source, source_stride)) return Operand{source, source_stride, rows.index, m, k};
  const size_t stride = operand_stride(k);
  for (uint32_t i = 0; i < m; ++i) {
    const size_t row = rows.index ? rows.index[i] : i;
    std::memcpy(data + i * stride, source + row * source_stride, k * sizeof(bf16));
  }
  return Operand{data, stride, nullptr, m, k};
}

inline size_t int8_operand_bytes(uint32_t, uint32_t) { return 0; }

inline Operand pack_int8(const Int8Rows& rows, const int32_t* index, uint32_t m, uint32_t k, std::byte*) {
  return {rows.codes, rows.stride, index, m, k, rows.row};
}

// `count` floats that may end anywhere, as a full vector; null stands for zeros.
KT_INLINE Float load_bias(const float* bias, size_t at, size_t count) {
  if (bias == nullptr) return Vec::set(0.0f);
  if (at + Vec::kWidth <= count) return Vec::load_f(bias + at);
  float full[Vec::kWidth] = {};
  std::memcpy(full, bias + at, (count - at) * sizeof(float));
  return Vec::load_f(full);
}

// C rows are padded to 16 floats, so whole vectors may be read; only what exists is stored.
template <class Map>
struct ActivateRows {
  static void run(const ActivateArgs& a) {
    if (is_plain(a)) {
      run_plain(a);
    } else {
      run_training(a);
    }
  }

  static KT_INLINE bf16* intermediate(const ActivateArgs& a, uint32_t m, size_t j) {
    auto* to = const_cast<std::byte*>(a.h.data) + m * a.h.stride_bytes + (a.n0 + j) * sizeof(bf16);
    return reinterpret_cast<bf16*>(to);
  }

  static void run_plain(const ActivateArgs& a) {
    const size_t n = a.n1 - a.n0, ld = c_stride(a.n1 - a.n0);
    for (size_t j = 0; j < n; j += Vec::kWidth) {
      const Float gate_bias = load_bias(a.gate_bias, j, n), up_bias = load_bias(a.up_bias, j, n);
      for (uint32_t m = 0; m < a.h.rows; ++m) {
        const Float g = Vec::add(Vec::load_f(a.c_gate + m * ld + j), gate_bias);
        const Float u = a.c_up ? Vec::add(Vec::load_f(a.c_up + m * ld + j), up_bias) : g;
        store_partial_bf16(intermediate(a, m, j), Map::apply(a.activation, g, u), n - j);
      }
    }
  }

  static void run_training(const ActivateArgs& a) {
    const size_t n = a.n1 - a.n0, ld = c_stride(a.n1 - a.n0);
    const Float scale = Vec::set(a.lora_scale);
    const KeptRows& kept = a.kept;
    for (size_t j = 0; j < n; j += Vec::kWidth) {
      const Float gate_bias = load_bias(a.gate_bias, j, n), up_bias = load_bias(a.up_bias, j, n);
      for (uint32_t m = 0; m < a.h.rows; ++m) {
        const size_t at = m * kept.stride + j;
        const Float g = Vec::add(with_adapter(a.c_gate, a.l_gate, scale, m * ld + j), gate_bias);
        if (kept.gate) store_partial(kept.gate, kept.type, at, g, n - j);
        Float u = g;
        if (a.c_up) {
          u = Vec::add(with_adapter(a.c_up, a.l_up, scale, m * ld + j), up_bias);
          if (kept.up) store_partial(kept.up, kept.type, at, u, n - j);
        }
        const Float h = Map::apply(a.activation, g, u);
        if (kept.h) store_partial_bf16(kept.h + at, h, n - j);
        if (a.h.data) store_partial_bf16(intermediate(a, m, j), h, n - j);
      }
    }
  }
};

inline void activate(const ActivateArgs& args) { for_activation<ActivateRows>(args); }

inline void store_rows(const StoreRowsArgs& a) {
  const size_t ld = c_stride(a.n);
  const bool copied = a.l == nullptr && a.bias == nullptr && a.y_type == FloatType::kFloat32;
  const Float scale = Vec::set(a.lora_scale);
  for (uint32_t m = 0; m < a.m; ++m) {
    if (copied) {
      std::memcpy(static_cast<float*>(a.y) + m * a.y_stride, a.c + m * ld, a.n * sizeof(float));
      continue;
    }
    for (size_t j = 0; j < a.n; j += Vec::kWidth) {
      Float y = with_adapter(a.c, a.l, scale, m * ld + j);
      if (a.bias) y = Vec::add(y, load_bias(a.bias, j, a.n));
      store_partial(a.y, a.y_type, m * a.y_stride + j, y, a.n - j);
    }
  }
}
