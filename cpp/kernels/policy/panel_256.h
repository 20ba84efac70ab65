// Panels of eight weight rows, on 256 bits. Included inside a target's namespace, after ints_256.h.

struct PanelVec {
  static constexpr size_t kLanes = 8;
  static constexpr int kPanels = 1, kTokens = 4;  // of a register tile
  using Ints = Ints8;
  using Floats = Floats8;
  static KT_INLINE Ints zero() { return zero_ints(); }
  static KT_INLINE Ints set(int32_t x) { return set_ints(x); }
  static KT_INLINE Ints minus(Ints a, Ints b) { return minus_ints(a, b); }
  static KT_INLINE Ints load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  // The four bytes at p, in every lane.
  static KT_INLINE Ints broadcast(const void* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm256_set1_epi32(x);
  }
  template <bool kNarrow>
  static KT_INLINE Ints dot_codes(Ints acc, Ints codes, Ints x) {
    return dot_quads<kNarrow>(acc, codes, x);
  }
  static KT_INLINE Ints dot_words(Ints acc, Ints a, Ints b) {
    return ktmoe::kernels::KT_TARGET_NAME::dot_words(acc, a, b);
  }
  // The lower and the upper word of each lane.
  static KT_INLINE Ints low_words(Ints x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 16), 16); }
  static KT_INLINE Ints high_words(Ints x) { return _mm256_srai_epi32(x, 16); }
  static KT_INLINE Ints add_product(Ints acc, Ints a, Ints b) {
    return _mm256_add_epi32(acc, _mm256_mullo_epi32(a, b));
  }
  static KT_INLINE Floats floats(Ints x) { return floats_of(x); }
  static KT_INLINE Floats set_f(float x) { return set_8(x); }
  static KT_INLINE Floats load_f(const float* p) { return load_8(p); }
  static KT_INLINE void store_f(float* p, Floats x) { store_8(p, x); }
  static KT_INLINE Floats mul(Floats a, Floats b) { return mul_8(a, b); }
  static KT_INLINE Floats fma(Floats a, Floats b, Floats c) { return fma_8(a, b, c); }

  // to[j][r] = quad j of row r, for 8 rows of 32 codes.
  static constexpr size_t kTransposedBytes = 32;
  static KT_INLINE void transpose(const std::byte* rows, size_t stride, std::byte* to) {
    __m256i a[8], b[8];
    KT_UNROLL for (size_t i = 0; i < 8; ++i) a[i] = load_32(rows + i * stride);
    KT_UNROLL for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    KT_UNROLL for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    auto* quads = reinterpret_cast<__m256i*>(to);
    KT_UNROLL for (int i = 0; i < 4; ++i) {
      _mm256_store_si256(quads + i, _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
      _mm256_store_si256(quads + 4 + i, _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
    }
  }
};
