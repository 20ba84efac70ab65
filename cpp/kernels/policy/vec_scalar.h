// Vectors without intrinsics: eight lanes in plain arrays, which the compiler maps to the vectors of the
// platform's baseline (SSE2, NEON). Included inside a target's namespace.

struct Vec {
  // ---- rows-dot-rows products ----
  static constexpr size_t kStep = 8;    // elements of K per step
  static constexpr int kRowTile = 4;    // weight rows per register tile
  static constexpr int kTokenTile = 1;  // activation rows per register tile
  struct Segment {
    float lane[8];
  };
  struct Float {
    float lane[8];
  };
  using Acc = Float;

  static KT_INLINE Acc zero_acc() { return Acc{}; }
  static KT_INLINE Segment load(const std::byte* p) {
    Segment s;
    uint16_t bits[8];
    std::memcpy(bits, p, sizeof bits);
    for (int i = 0; i < 8; ++i) s.lane[i] = to_float(bf16{bits[i]});
    return s;
  }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    uint16_t bits[8] = {};
    std::memcpy(bits, p, count * sizeof bits[0]);
    return load(reinterpret_cast<const std::byte*>(bits));
  }
  static KT_INLINE void store(std::byte* p, const Segment& s) {
    uint16_t bits[8];
    for (int i = 0; i < 8; ++i) bits[i] = to_bf16(s.lane[i]).bits;
    std::memcpy(p, bits, sizeof bits);
  }
  static KT_INLINE void dot(Acc& acc, const Segment& w, const Segment& x) {
    for (int i = 0; i < 8; ++i) acc.lane[i] += w.lane[i] * x.lane[i];
  }
  // Sums of kRows accumulators, each by the same tree.
  template <int kRows>
  static KT_INLINE void reduce(const Acc (&acc)[kRows], float* out) {
    for (int r = 0; r < kRows; ++r) {
      const float* v = acc[r].lane;
      out[r] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    }
  }

  // ---- int8 codes ----
  struct Codes {
    int8_t lane[8];
  };
  static KT_INLINE Codes no_codes() { return {}; }
  static KT_INLINE Codes load_codes(const std::byte* p) { return load_codes_partial(p, kStep); }
  static KT_INLINE Codes load_codes_partial(const std::byte* p, size_t count) {
    Codes codes = {};
    std::memcpy(codes.lane, p, count);
    return codes;
  }
  // table[nibble] for kStep nibbles; the low nibble of a byte comes first.
  static KT_INLINE Codes look_up(const std::byte* nibbles, const int8_t* table) {
    Codes codes;
    for (size_t i = 0; i < kStep; ++i)
      codes.lane[i] = table[static_cast<int>(nibbles[i / 2]) >> (i % 2 * 4) & 15];
    return codes;
  }
  // Codes are looked up and converted; other policies look up bf16.
  static constexpr bool kLooksUpScaled = false;
  struct Numbers {
    constexpr void set(int, uint16_t) {}
  };
  static KT_INLINE Segment look_up_segment(const std::byte* nibbles, const int8_t* table, const Numbers&) {
    return to_segment(look_up(nibbles, table));
  }
  static KT_INLINE Segment to_segment(const Codes& codes) {
    Segment s;
    for (size_t i = 0; i < kStep; ++i) s.lane[i] = codes.lane[i];
    return s;
  }
  static KT_INLINE Segment to_segment(const Codes& codes, float scale) {
    Segment s;
    for (size_t i = 0; i < kStep; ++i)
      s.lane[i] = to_float(to_bf16(static_cast<float>(codes.lane[i]) * scale));
    return s;
  }
  static KT_INLINE Segment times(const Segment& x, float scale) {
    Segment s;
    for (size_t i = 0; i < kStep; ++i) s.lane[i] = to_float(to_bf16(x.lane[i] * scale));
    return s;
  }

  // ---- integer products ----
  static constexpr int32_t kWeightOffset = 0;
  struct Bytes {
    int8_t lane[16];
  };
  struct IntAcc {
    int32_t lane[8];
  };
  static KT_INLINE IntAcc zero_int() { return {}; }
  static KT_INLINE Bytes load_bytes(const std::byte* p) { return load_bytes_partial(p, 2 * kStep); }
  static KT_INLINE Bytes load_bytes_partial(const std::byte* p, size_t count) {
    Bytes bytes = {};
    std::memcpy(bytes.lane, p, count);
    return bytes;
  }
  static KT_INLINE void store_bytes(std::byte* p, const Bytes& x) { std::memcpy(p, x.lane, sizeof x.lane); }
  static KT_INLINE Bytes join(const Codes& low, const Codes& high) {
    Bytes bytes;
    std::memcpy(bytes.lane, low.lane, kStep);
    std::memcpy(bytes.lane + kStep, high.lane, kStep);
    return bytes;
  }
  // look_up of 2 kStep nibbles, with one table for each half of them.
  static KT_INLINE Bytes look_up(const std::byte* nibbles, const int8_t* low, const int8_t* high) {
    return join(look_up(nibbles, low), look_up(nibbles + kStep / 2, high));
  }
  static KT_INLINE Bytes as_weights(const Bytes& x) { return x; }
  static KT_INLINE void dot_bytes(IntAcc& acc, const Bytes& w, const Bytes& x) {
    for (size_t i = 0; i < kStep; ++i)
      acc.lane[i] += w.lane[i] * x.lane[i] + w.lane[i + kStep] * x.lane[i + kStep];
  }
  template <int kRows>
  static KT_INLINE void reduce_int(const IntAcc (&acc)[kRows], int32_t* out) {
    for (int r = 0; r < kRows; ++r) {
      out[r] = 0;
      for (int32_t lane : acc[r].lane) out[r] += lane;
    }
  }

  // ---- products of pairs ----
  static constexpr int kPairRows = 2,
                       kPairGroups = 1;  // rows of the lhs and groups of columns of a register tile
  struct Pairs {
    float even[8], odd[8];
  };
  static KT_INLINE Pairs load_pairs(const std::byte* p) {
    uint32_t pair[8];
    std::memcpy(pair, p, sizeof pair);
    Pairs r;
    for (int i = 0; i < 8; ++i) r.even[i] = std::bit_cast<float>(pair[i] << 16);
    for (int i = 0; i < 8; ++i) r.odd[i] = std::bit_cast<float>(pair[i] & 0xffff0000u);
    return r;
  }
  static KT_INLINE Pairs broadcast_pair(uint32_t pair) {
    Pairs r;
    for (int i = 0; i < 8; ++i) r.even[i] = std::bit_cast<float>(pair << 16);
    for (int i = 0; i < 8; ++i) r.odd[i] = std::bit_cast<float>(pair & 0xffff0000u);
    return r;
  }
  static KT_INLINE void dot_pairs(Acc& acc, const Pairs& lhs, const Pairs& rhs) {
    for (int i = 0; i < 8; ++i) acc.lane[i] += lhs.even[i] * rhs.even[i];
    for (int i = 0; i < 8; ++i) acc.lane[i] += lhs.odd[i] * rhs.odd[i];
  }

  // ---- limits ----
  static constexpr int kPeakChains = 4;
  struct Sum {
    uint64_t lane[8];
  };
  static KT_INLINE void add_to(Sum& sum, const std::byte* p) {
    uint64_t v[8];
    std::memcpy(v, p, sizeof v);
    for (int i = 0; i < 8; ++i) sum.lane[i] ^= v[i];
  }

  // ---- elementwise fp32 ----
  static constexpr size_t kWidth = 8;
  struct Mask {
    bool lane[8];
  };

#define KT_MAP(expression)                                      \
  Float r;                                                      \
  for (size_t i = 0; i < kWidth; ++i) r.lane[i] = (expression); \
  return r

  static KT_INLINE Float set(float x) { KT_MAP(x); }
  static KT_INLINE Float load_f(const float* p) { KT_MAP(p[i]); }
  static KT_INLINE Float load_bf16(const bf16* p) { KT_MAP(to_float(p[i])); }
  // The even and the odd elements of 2 kWidth bf16.
  static KT_INLINE Float load_even(const std::byte* p) { return load_every_second(p, 0); }
  static KT_INLINE Float load_odd(const std::byte* p) { return load_every_second(p, 1); }
  static KT_INLINE Float load_every_second(const std::byte* p, size_t first) {
    uint16_t bits[2 * kWidth];
    std::memcpy(bits, p, sizeof bits);
    KT_MAP(to_float(bf16{bits[2 * i + first]}));
  }
  static KT_INLINE void store_f(float* p, const Float& x) { std::memcpy(p, x.lane, sizeof x.lane); }
  // int32 values stored in a float array.
  static KT_INLINE Float load_ints(const float* p) {
    KT_MAP(static_cast<float>(std::bit_cast<int32_t>(p[i])));
  }
  static KT_INLINE void store_bf16(bf16* p, const Float& x) {
    for (size_t i = 0; i < kWidth; ++i) p[i] = to_bf16(x.lane[i]);
  }
  // The float16 at p, broadcast to all lanes.
  static KT_INLINE Float half(const std::byte* p) { return set(half_at(p)); }
  static KT_INLINE Float load_half_at(const std::byte* p) { KT_MAP(half_at(p + 2 * i)); }
  // int8 values from the `first`-th on, eight per word.
  static KT_INLINE Float int8_of(const uint64_t* words, size_t first) { KT_MAP(int8_at(words, first + i)); }
  static constexpr float int8_at(const uint64_t* words, size_t i) {
    return static_cast<float>(static_cast<int8_t>(words[i / 8] >> 8 * (i % 8)));
  }
  static KT_INLINE void to_floats(const Codes& codes, Float (&x)[1]) {
    for (size_t i = 0; i < kWidth; ++i) x[0].lane[i] = codes.lane[i];
  }
  static KT_INLINE void store_rounded(std::byte* p, const Float (&x)[1]) {
    store_bf16(reinterpret_cast<bf16*>(p), x[0]);
  }
  static KT_INLINE void store_scaled(std::byte* p, const Float (&x)[1]) { store_rounded(p, x); }
  static KT_INLINE Float without_payload(const Float& x) { return x; }
  // p[2 i] = even[i], p[2 i + 1] = odd[i]
  static KT_INLINE void store_bf16_pairs(bf16* p, const Float& even, const Float& odd) {
    for (size_t i = 0; i < kWidth; ++i) {
      p[2 * i] = to_bf16(even.lane[i]);
      p[2 * i + 1] = to_bf16(odd.lane[i]);
    }
  }
  // The sum of all lanes, by the tree of reduce.
  static KT_INLINE float sum(const Float& x) {
    Acc lanes[1];
    std::memcpy(lanes[0].lane, x.lane, sizeof x.lane);
    float total;
    reduce(lanes, &total);
    return total;
  }
  static KT_INLINE Float add(const Float& a, const Float& b) { KT_MAP(a.lane[i] + b.lane[i]); }
  static KT_INLINE Float sub(const Float& a, const Float& b) { KT_MAP(a.lane[i] - b.lane[i]); }
  static KT_INLINE Float mul(const Float& a, const Float& b) { KT_MAP(a.lane[i] * b.lane[i]); }
  static KT_INLINE Float div(const Float& a, const Float& b) { KT_MAP(a.lane[i] / b.lane[i]); }
  // a * b + c, fused where the instruction set fuses
  static constexpr bool kFusesFma = false;  // fma rounds once
  static KT_INLINE Float fma(const Float& a, const Float& b, const Float& c) {
    KT_MAP(a.lane[i] * b.lane[i] + c.lane[i]);
  }
  // A NaN in x is kept; limits are never NaN.
  static KT_INLINE Float clamp_above(const Float& x, const Float& limit) {
    KT_MAP(x.lane[i] > limit.lane[i] ? limit.lane[i] : x.lane[i]);
  }
  static KT_INLINE Float clamp_below(const Float& x, const Float& limit) {
    KT_MAP(x.lane[i] < limit.lane[i] ? limit.lane[i] : x.lane[i]);
  }
  static KT_INLINE Float abs(const Float& x) { KT_MAP(x.lane[i] < 0 ? -x.lane[i] : x.lane[i]); }
  static KT_INLINE Mask less(const Float& a, const Float& b) {
    Mask m;
    for (size_t i = 0; i < kWidth; ++i) m.lane[i] = a.lane[i] < b.lane[i];
    return m;
  }
  static KT_INLINE Float select(const Mask& m, const Float& yes, const Float& no) {
    KT_MAP(m.lane[i] ? yes.lane[i] : no.lane[i]);
  }
  // To the nearest integer, for |x| < 2^22; NaN stays NaN.
  static KT_INLINE Float round(const Float& x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
    KT_MAP((x.lane[i] + kMagic) - kMagic);
  }
  // x 2^n for an integral n, rounded once. In two factors, as n may exceed the exponents of normal numbers.
  static KT_INLINE Float scale(const Float& x, const Float& n) {
    const Float half = round(mul(n, set(0.5f)));
    return mul(mul(x, pow2(half)), pow2(sub(n, half)));
  }
  // 2^n for an integral n in [-126, 127]; undefined for a NaN.
  static KT_INLINE Float pow2(const Float& n) {
    KT_MAP(
        std::bit_cast<float>((n.lane[i] == n.lane[i] ? static_cast<int32_t>(n.lane[i]) + 127 : 127) << 23));
  }

  // ---- quantizing ----
  struct Bits {
    int32_t lane[kWidth];
  };
  static KT_INLINE Float load_f_at(const std::byte* p) {
    Float x;
    std::memcpy(x.lane, p, sizeof x.lane);
    return x;
  }
  static KT_INLINE Float load_bf16_at(const std::byte* p) {
    bf16 x[kWidth];
    std::memcpy(x, p, sizeof x);
    return load_bf16(x);
  }
  static KT_INLINE Bits zero_bits() { return Bits{}; }
  // Magnitudes are compared as bits, so infinities and NaN are larger than any finite number.
  static KT_INLINE Bits larger_size(Bits sizes, const Float& x) {
    for (size_t i = 0; i < kWidth; ++i) {
      const int32_t size = std::bit_cast<int32_t>(x.lane[i]) & 0x7fffffff;
      sizes.lane[i] = sizes.lane[i] < size ? size : sizes.lane[i];
    }
    return sizes;
  }
  static KT_INLINE float largest_size(const Bits& sizes) {
    int32_t largest = 0;
    for (size_t i = 0; i < kWidth; ++i) largest = largest < sizes.lane[i] ? sizes.lane[i] : largest;
    return std::bit_cast<float>(largest);
  }
  // Bits or'ed with those of x as integers.
  static KT_INLINE Bits join_whole(Bits joined, const Float& x) {
    for (size_t i = 0; i < kWidth; ++i) joined.lane[i] |= static_cast<int32_t>(x.lane[i]);
    return joined;
  }
  static KT_INLINE uint32_t join(const Bits& joined) {
    int32_t all = 0;
    for (size_t i = 0; i < kWidth; ++i) all |= joined.lane[i];
    return static_cast<uint32_t>(all);
  }
  static KT_INLINE float largest(const Float& x) {
    float largest = x.lane[0];
    for (size_t i = 1; i < kWidth; ++i) largest = largest < x.lane[i] ? x.lane[i] : largest;
    return largest;
  }
  // x rounded to bf16; x is not NaN. to_bf16 tests for NaN, which keeps the compiler from vectorizing it.
  static KT_INLINE Float nearest_bf16(const Float& x) {
    uint32_t bits[kWidth];
    std::memcpy(bits, x.lane, sizeof bits);
    for (uint32_t& b : bits) b = (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
    KT_MAP(std::bit_cast<float>(bits[i]));
  }
  // Rounded to integers; x lies in the range of int8.
  static KT_INLINE void store_int8(int8_t* p, const Float& x) {
    const Float whole = round(x);
    for (size_t i = 0; i < kWidth; ++i) p[i] = static_cast<int8_t>(whole.lane[i]);
  }
#undef KT_MAP
};
