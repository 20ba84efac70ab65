// Sums of products of codes, eight int32 to a vector, in plain arrays. Included inside a target's namespace,
// after bytes_portable.h. See ints_256.h.

struct Ints8 {
  int32_t lane[8];
};
struct Words16 {
  int16_t lane[16];
};
struct Floats8 {
  float lane[8];
};

#define KT_MAP(Type, count, expression)                        \
  Type r;                                                      \
  for (size_t i = 0; i < (count); ++i) r.lane[i] = expression; \
  return r

KT_INLINE Ints8 zero_ints() { return {}; }
KT_INLINE Ints8 set_ints(int32_t x) { KT_MAP(Ints8, 8, x); }
KT_INLINE Ints8 minus_ints(const Ints8& a, const Ints8& b) { KT_MAP(Ints8, 8, a.lane[i] - b.lane[i]); }
template <int kShift>
KT_INLINE Ints8 shift_left(const Ints8& x) {
  KT_MAP(Ints8, 8, x.lane[i] * (1 << kShift));
}
KT_INLINE int32_t product_at(const Bytes32& codes, const Bytes32& x, size_t i) {
  return static_cast<int32_t>(codes.lane[i]) * static_cast<int8_t>(x.lane[i]);
}
KT_INLINE Ints8 dot_words(const Ints8& acc, const Words16& a, const Words16& b) {
  KT_MAP(
      Ints8, 8,
      acc.lane[i] + int32_t{a.lane[2 * i]} * b.lane[2 * i] + int32_t{a.lane[2 * i + 1]} * b.lane[2 * i + 1]);
}
inline constexpr bool kDotsWideCodes = true;
template <bool kNarrow>
KT_INLINE Ints8 dot_quads(const Ints8& acc, const Bytes32& codes, const Bytes32& x) {
  KT_MAP(Ints8, 8,
         acc.lane[i] + product_at(codes, x, 4 * i) + product_at(codes, x, 4 * i + 1) +
             product_at(codes, x, 4 * i + 2) + product_at(codes, x, 4 * i + 3));
}
template <bool kNarrow>
KT_INLINE Words16 dot_pairs(const Bytes32& codes, const Bytes32& x) {
  constexpr int32_t kLess = kNarrow ? 0 : 128;
  KT_MAP(Words16, 16,
         static_cast<int16_t>((codes.lane[2 * i] - kLess) * static_cast<int8_t>(x.lane[2 * i]) +
                              (codes.lane[2 * i + 1] - kLess) * static_cast<int8_t>(x.lane[2 * i + 1])));
}
KT_INLINE int16_t group_word(const uint64_t* words, size_t g) {
  return static_cast<int8_t>(words[g / 8] >> 8 * (g % 8));
}
template <size_t kGroups>
KT_INLINE Words16 group_words(const uint64_t* words) {
  KT_MAP(Words16, 16, i < kGroups ? group_word(words, i) : int16_t{0});
}
KT_INLINE void store_words(std::byte* p, const Words16& x) { std::memcpy(p, x.lane, sizeof x.lane); }
template <size_t kGroups>
KT_INLINE Words16 load_sums(const int16_t* sums) {
  KT_MAP(Words16, 16, i < kGroups ? sums[i] : int16_t{0});
}
template <size_t kGroups>
KT_INLINE Words16 words_to_spread(const uint64_t* words) {
  KT_MAP(Words16, 16, kGroups == 16 ? group_word(words, i % 8 * 2 + i / 8) : group_word(words, i % 8));
}
KT_INLINE Words16 spread_group(const Words16& words, size_t g) {
  KT_MAP(Words16, 16, words.lane[i / 8 * 8 + g]);
}
KT_INLINE void sums_of_halves(const Ints8 (&x)[8], Ints8& low, Ints8& high) {
  for (int r = 0; r < 8; ++r) {
    const int32_t* v = x[r].lane;
    low.lane[r] = v[0] + v[1] + v[2] + v[3], high.lane[r] = v[4] + v[5] + v[6] + v[7];
  }
}
KT_INLINE Ints8 sums_of_eight(const Ints8 (&x)[8]) {
  Ints8 low, high;
  sums_of_halves(x, low, high);
  KT_MAP(Ints8, 8, low.lane[i] + high.lane[i]);
}

KT_INLINE Bytes32 zero_bytes() { return {}; }

KT_INLINE Floats8 floats_of(const Ints8& x) { KT_MAP(Floats8, 8, static_cast<float>(x.lane[i])); }
KT_INLINE Floats8 set_8(float x) { KT_MAP(Floats8, 8, x); }
KT_INLINE Floats8 load_8(const float* p) { KT_MAP(Floats8, 8, p[i]); }
KT_INLINE void store_8(float* p, const Floats8& x) { std::memcpy(p, x.lane, sizeof x.lane); }
KT_INLINE Floats8 mul_8(const Floats8& a, const Floats8& b) { KT_MAP(Floats8, 8, a.lane[i] * b.lane[i]); }
KT_INLINE Floats8 fma_8(const Floats8& a, const Floats8& b, const Floats8& c) {
  KT_MAP(Floats8, 8, std::fma(a.lane[i], b.lane[i], c.lane[i]));
}
KT_INLINE Floats8 eight_halves(const std::byte* p, ptrdiff_t stride) {
  KT_MAP(Floats8, 8, half_at(p + static_cast<ptrdiff_t>(i) * stride));
}
KT_INLINE Floats8 eight_bf16(const std::byte* p, ptrdiff_t stride) {
  Floats8 floats;
  for (ptrdiff_t r = 0; r < 8; ++r) {
    bf16 x;
    std::memcpy(&x, p + r * stride, sizeof x);
    floats.lane[r] = to_float(x);
  }
  return floats;
}
KT_INLINE Ints8 eight_dwords(const std::byte* p, ptrdiff_t stride) {
  Ints8 x;
  for (ptrdiff_t r = 0; r < 8; ++r) std::memcpy(x.lane + r, p + r * stride, sizeof x.lane[r]);
  return x;
}
KT_INLINE Ints8 byte_of_dwords(const Ints8& x, size_t byte) { KT_MAP(Ints8, 8, x.lane[i] >> 8 * byte & 255); }
KT_INLINE Floats8 bf16_of_dwords(const Ints8& x, size_t word) {
  KT_MAP(Floats8, 8, to_float(bf16{static_cast<uint16_t>(x.lane[i] >> 16 * word)}));
}
KT_INLINE Ints8 eight_bytes(const std::byte* p, ptrdiff_t stride) {
  KT_MAP(Ints8, 8, static_cast<int32_t>(p[static_cast<ptrdiff_t>(i) * stride]));
}

// Panels of eight weight rows.
struct PanelVec {
  static constexpr size_t kLanes = 8;
  static constexpr int kPanels = 1, kTokens = 1;
  using Ints = Ints8;
  using Floats = Floats8;
  static KT_INLINE Ints zero() { return {}; }
  static KT_INLINE Ints set(int32_t x) { return set_ints(x); }
  static KT_INLINE Ints add(const Ints& a, const Ints& b) { KT_MAP(Ints, 8, a.lane[i] + b.lane[i]); }
  static KT_INLINE Ints minus(const Ints& a, const Ints& b) { return minus_ints(a, b); }
  template <int kShift>
  static KT_INLINE Ints shifted(const Ints& x) {
    return shift_left<kShift>(x);
  }
  static KT_INLINE Ints load(const void* p) {
    Ints x;
    std::memcpy(x.lane, p, sizeof x.lane);
    return x;
  }
  static KT_INLINE Ints broadcast(const void* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return set_ints(x);
  }
  template <bool kNarrow>
  static KT_INLINE Ints dot_codes(const Ints& acc, const Ints& codes, const Ints& x) {
    return dot_quads<kNarrow>(acc, std::bit_cast<Bytes32>(codes), std::bit_cast<Bytes32>(x));
  }
  static KT_INLINE Ints dot_words(const Ints& acc, const Ints& a, const Ints& b) {
    return ktmoe::kernels::KT_TARGET_NAME::dot_words(acc, std::bit_cast<Words16>(a),
                                                     std::bit_cast<Words16>(b));
  }
  static KT_INLINE Ints low_words(const Ints& x) {
    KT_MAP(Ints, 8, static_cast<int16_t>(x.lane[i] & 0xffff));
  }
  static KT_INLINE Ints high_words(const Ints& x) { KT_MAP(Ints, 8, x.lane[i] >> 16); }
  static KT_INLINE Ints add_product(const Ints& acc, const Ints& a, const Ints& b) {
    KT_MAP(Ints, 8, acc.lane[i] + a.lane[i] * b.lane[i]);
  }
  static KT_INLINE Floats floats(const Ints& x) { return floats_of(x); }
  static KT_INLINE Floats set_f(float x) { return set_8(x); }
  static KT_INLINE Floats load_f(const float* p) { return load_8(p); }
  static KT_INLINE void store_f(float* p, const Floats& x) { store_8(p, x); }
  static KT_INLINE Floats mul(const Floats& a, const Floats& b) { return mul_8(a, b); }
  static KT_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) { return fma_8(a, b, c); }

  static constexpr size_t kTransposedBytes = 32;
  static KT_INLINE void transpose(const std::byte* rows, size_t stride, std::byte* to) {
    for (size_t r = 0; r < kLanes; ++r)
      for (size_t j = 0; j < 8; ++j) std::memcpy(to + (j * kLanes + r) * 4, rows + r * stride + j * 4, 4);
  }
};
#undef KT_MAP
