// Rows of weights to int8: multiples of a scale. That of a row is amax / 127; that of a group is found by the
// search that the reference (quantize_int8) states step by step.
// Included inside a target's namespace, after elements-inl.h.

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

// ---- common to the searches for scales ----

constexpr float kLargestBf16 = 0x1.fep+127f;

// The power of two that takes amax to [2, 4); 2^127, which takes it less far, of a denormal number or 0.
KT_INLINE float normalizer(float amax) {
  const uint32_t exponent = 255 - (std::bit_cast<uint32_t>(amax) >> 23);
  return std::bit_cast<float>((exponent < 254 ? exponent : 254) << 23);
}

// Sums go over 16 lanes, added by halves at the end.
constexpr size_t kSumLanes = 16, kSumVectors = kSumLanes / Vec::kWidth;

struct LaneSum {
  Float part[kSumVectors];
  KT_INLINE Float halves() const {
    if constexpr (kSumVectors == 2) return Vec::add(part[0], part[1]);
    return part[0];
  }
};

// ---- one scale per row ----

// Nearest code to t, from -127 to 127. A scale that was rounded as a denormal number, or limited, has
// quotients beyond them.
KT_INLINE Float nearest_int8(const Float& t) {
  return Vec::clamp_above(Vec::clamp_below(Vec::round(t), Vec::set(-127.0f)), Vec::set(127.0f));
}

// Multiples of `scale` nearest to columns [begin, end) of a row. `end` is the last column or a whole number
// of vectors behind the first.
template <class T>
KT_INLINE void store_int8_codes(const WeightRow<T>& row, size_t begin, size_t end, float scale,
                                std::byte* codes) {
  // Divided by infinity, all are 0.
  const Float divisor = Vec::set(scale > 0 ? scale : std::numeric_limits<float>::infinity());
  for (size_t at = begin; at < end; at += Vec::kWidth) {
    const Float x = nearest_int8(Vec::div(row.load(at), divisor));
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
    a.channel_scale[n] = scale;
    store_int8_codes(row, 0, a.k, scale, a.codes + n * a.codes_stride);
  }
  return a.n;
}

// ---- one scale per group ----

// The scales tried for a group are its amax over these; the reference says why these.
constexpr size_t kScalesTried = 16;
alignas(64) constexpr float kDivisors[kScalesTried] = {127.0f,  127.25f, 126.75f, 126.25f, 125.75f, 125.25f,
                                                       124.75f, 124.25f, 123.75f, 123.25f, 122.75f, 122.25f,
                                                       121.75f, 121.25f, 120.75f, 120.25f};

// A group of a row while it is quantized: v = w power, with amax of v in [2, 4) unless amax is denormal.
struct Int8Search {
  static constexpr size_t kGroup = formats::Int8Group32::kGroup, kVectors = kGroup / Vec::kWidth;
  Float v[kVectors];
  alignas(64) float scale[kScalesTried];
  // scale power, and 1 over it
  alignas(64) float step[kScalesTried], reciprocal[kScalesTried];

  // Columns [begin, end) of a row; those behind the last count as zeros.
  template <class T>
  KT_INLINE Int8Search(const WeightRow<T>& row, size_t begin, size_t end) {
    const float amax = row.amax(begin, end), power = normalizer(amax);
    const Float factor = Vec::set(power), zero = Vec::set(0.0f);
    KT_UNROLL
    for (size_t i = 0; i < kVectors; ++i) {
      const size_t at = begin + i * Vec::kWidth;
      v[i] = at < end ? Vec::mul(row.load(at), factor) : zero;
    }
    // No decoded weight is larger than the largest bfloat16.
    const Float most = Vec::set(kLargestBf16 / 127.0f);
    for (size_t c = 0; c < kScalesTried; c += Vec::kWidth) {
      const Float s = Vec::clamp_above(Vec::div(Vec::set(amax), Vec::load_f(kDivisors + c)), most);
      const Float scaled = Vec::mul(s, factor), inverse = Vec::div(Vec::set(1.0f), scaled);
      Vec::store_f(scale + c, s);
      Vec::store_f(step + c, scaled);
      Vec::store_f(reciprocal + c, Vec::select(Vec::less(zero, scaled), inverse, zero));
    }
  }

  KT_INLINE Float codes(size_t i, size_t choice) const {
    return nearest_int8(Vec::mul(v[i], Vec::set(reciprocal[choice])));
  }

  // The sum of (v - bf(code step))^2, but for the reduction.
  KT_INLINE Float squares_of_errors(size_t choice) const {
    LaneSum sum;
    KT_UNROLL
    for (size_t i = 0; i < kVectors; ++i) {
      const Float decoded = Vec::nearest_bf16(Vec::mul(codes(i, choice), Vec::set(step[choice])));
      const Float error = Vec::sub(v[i], decoded), square = Vec::mul(error, error);
      Float& part = sum.part[i % kSumVectors];
      part = i < kSumVectors ? square : Vec::add(part, square);
    }
    return sum.halves();
  }

  // The first scale of the least error.
  KT_INLINE size_t best() const {
    alignas(64) float error[kScalesTried];
    for (size_t c = 0; c < kScalesTried; c += Vec::kRowTile) {
      Vec::Acc sums[Vec::kRowTile];
      KT_UNROLL
      for (size_t i = 0; i < static_cast<size_t>(Vec::kRowTile); ++i) sums[i] = squares_of_errors(c + i);
      Vec::reduce(sums, error + c);
    }
    size_t least = 0;
    for (size_t c = 1; c < kScalesTried; ++c) least = error[c] < error[least] ? c : least;
    return least;
  }

  KT_INLINE void store_codes(size_t choice, std::byte* to, size_t count) const {
    int8_t q[kGroup];
    KT_UNROLL
    for (size_t i = 0; i < kVectors; ++i) Vec::store_int8(q + i * Vec::kWidth, codes(i, choice));
    std::memcpy(to, q, count);
  }
};

template <class T>
uint32_t quantize_int8_group_of(const QuantizeArgs& a) {
  for (uint32_t n = 0; n < a.n; ++n) {
    const auto row = WeightRow<T>::of(a, n);
    if (!is_number(row.amax(0, a.k))) return n;
    std::byte *codes = a.codes + n * a.codes_stride, *scales = codes + a.k;
    constexpr size_t kGroup = Int8Search::kGroup;
    for (size_t begin = 0; begin < a.k; begin += kGroup, scales += sizeof(float)) {
      const size_t end = begin + kGroup < a.k ? begin + kGroup : a.k;
      const Int8Search search(row, begin, end);
      const size_t choice = search.best();
      std::memcpy(scales, &search.scale[choice], sizeof(float));
      search.store_codes(choice, codes + begin, end - begin);
    }
  }
  return a.n;
}

inline uint32_t quantize_int8(const QuantizeArgs& a) {
  return a.type == FloatType::kBf16 ? quantize_int8_of<bf16>(a) : quantize_int8_of<float>(a);
}

inline uint32_t quantize_int8_group(const QuantizeArgs& a) {
  return a.type == FloatType::kBf16 ? quantize_int8_group_of<bf16>(a) : quantize_int8_group_of<float>(a);
}
