// Rows of weights to int8: codes that are multiples of a scale, amax / 127 of the row or of a group.
// Included inside a target's namespace, after elements.h.

// A row of weights of type T, at any address.
template <class T>
struct WeightRow {
  static constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  const std::byte* data;
  size_t k;

  static KT_INLINE WeightRow of(const QuantizeArgs& a, uint32_t n) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(n) * a.stride * static_cast<ptrdiff_t>(sizeof(T));
    return {static_cast<const std::byte*>(a.rows) + at, a.k};
  }
  static KT_INLINE Float load_at(const std::byte* p) {
    if constexpr (kIsBf16) return Vec::load_bf16_at(p);
    return Vec::load_f_at(p);
  }
  // A vector of the columns from `at` on; those behind the last are zeros.
  KT_INLINE Float load(size_t at) const {
    if (at + Vec::kWidth <= k) return load_at(data + at * sizeof(T));
    std::byte full[Vec::kWidth * sizeof(T)] = {};
    std::memcpy(full, data + at * sizeof(T), (k - at) * sizeof(T));
    return load_at(full);
  }
  // The largest size of columns [begin, end); an infinity or NaN when one of them is.
  KT_INLINE float amax(size_t begin, size_t end) const {
    Vec::Bits sizes = Vec::zero_bits();
    for (size_t at = begin; at < end; at += Vec::kWidth) sizes = Vec::larger_size(sizes, load(at));
    return Vec::largest_size(sizes);
  }
};

KT_INLINE bool is_number(float x) { return x - x == 0; }

// Multiples of `scale` nearest to columns [begin, end) of a row. `end` is the last column or a whole number
// of vectors behind the first.
template <class T>
KT_INLINE void store_int8_codes(const WeightRow<T>& row, size_t begin, size_t end, float scale,
                                std::byte* codes) {
  // Divided by infinity, all are 0.
  const Float divisor = Vec::set(scale > 0 ? scale : std::numeric_limits<float>::infinity());
  const Float most = Vec::set(127.0f), least = Vec::set(-127.0f);
  for (size_t at = begin; at < end; at += Vec::kWidth) {
    // A denormal scale is a rounded one, and quotients are beyond 127.
    Float x = Vec::round(Vec::div(row.load(at), divisor));
    x = Vec::clamp_above(Vec::clamp_below(x, least), most);
    int8_t* to = reinterpret_cast<int8_t*>(codes + at);
    if (at + Vec::kWidth <= end) {
      Vec::store_int8(to, x);
    } else {
      int8_t full[Vec::kWidth];
      Vec::store_int8(full, x);
      std::memcpy(to, full, end - at);
    }
  }
}

template <class T>
uint32_t quantize_int8_of(const QuantizeArgs& a) {
  for (uint32_t n = 0; n < a.n; ++n) {
    const auto row = WeightRow<T>::of(a, n);
    const float amax = row.amax(0, a.k);
    if (!is_number(amax)) return n;
    const float scale = amax / 127.0f;
    a.row_scale[n] = scale;
    store_int8_codes(row, 0, a.k, scale, a.codes + n * a.codes_stride);
  }
  return a.n;
}

template <class T>
uint32_t quantize_int8_group_of(const QuantizeArgs& a) {
  for (uint32_t n = 0; n < a.n; ++n) {
    const auto row = WeightRow<T>::of(a, n);
    if (!is_number(row.amax(0, a.k))) return n;
    std::byte *codes = a.codes + n * a.codes_stride, *scales = codes + a.k;
    constexpr size_t kGroup = formats::Int8Group32::kGroup;
    for (size_t begin = 0; begin < a.k; begin += kGroup, scales += sizeof(float)) {
      const size_t end = begin + kGroup < a.k ? begin + kGroup : a.k;
      const float scale = row.amax(begin, end) / 127.0f;
      std::memcpy(scales, &scale, sizeof scale);
      store_int8_codes(row, begin, end, scale, codes);
    }
  }
  return a.n;
}

inline uint32_t quantize_int8_rows(const QuantizeArgs& a) {
  return a.type == FloatType::kBf16 ? quantize_int8_of<bf16>(a) : quantize_int8_of<float>(a);
}

inline uint32_t quantize_int8_group_rows(const QuantizeArgs& a) {
  return a.type == FloatType::kBf16 ? quantize_int8_group_of<bf16>(a) : quantize_int8_group_of<float>(a);
}
