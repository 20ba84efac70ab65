// Panels of sixteen weight rows, on 512 bits. Included inside a target's namespace, after
// transpose_avx512-inl.h.

struct PanelVec {
  static constexpr size_t kLanes = 16;
  static constexpr int kPanels = 2, kTokens = 4;  // of a register tile
  using Ints = __m512i;
  using Floats = __m512;
  static KT_INLINE Ints zero() { return _mm512_setzero_si512(); }
  static KT_INLINE Ints set(int32_t x) { return _mm512_set1_epi32(x); }
  static KT_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static KT_INLINE Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  template <int kShift>
  static KT_INLINE Ints shifted(Ints x) {
    return _mm512_slli_epi32(x, kShift);
  }
  static KT_INLINE Ints load(const void* p) { return _mm512_load_si512(p); }
  // The four bytes at p, in every lane.
  static KT_INLINE Ints broadcast(const void* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
  }
  template <bool kNarrow>
  static KT_INLINE Ints dot_codes(Ints acc, Ints codes, Ints x) {
    return _mm512_dpbusd_epi32(acc, codes, x);
  }
  static KT_INLINE Ints dot_words(Ints acc, Ints a, Ints b) { return _mm512_dpwssd_epi32(acc, a, b); }
  // The lower and the upper word of each lane.
  static KT_INLINE Ints low_words(Ints x) { return _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16); }
  static KT_INLINE Ints high_words(Ints x) { return _mm512_srai_epi32(x, 16); }
  static KT_INLINE Ints add_product(Ints acc, Ints a, Ints b) {
    return _mm512_add_epi32(acc, _mm512_mullo_epi32(a, b));
  }
  static KT_INLINE Floats floats(Ints x) { return _mm512_cvtepi32_ps(x); }
  static KT_INLINE Floats set_f(float x) { return _mm512_set1_ps(x); }
  static KT_INLINE Floats load_f(const float* p) { return _mm512_loadu_ps(p); }
  static KT_INLINE void store_f(float* p, Floats x) { _mm512_storeu_ps(p, x); }
  static KT_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static KT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  // to[j][r] = quad j of row r, for 16 rows of 64 codes.
  static constexpr size_t kTransposedBytes = 64;
  static KT_INLINE void transpose(const std::byte* rows, size_t stride, std::byte* to) {
    const std::byte* row[16];
    for (size_t i = 0; i < 16; ++i) row[i] = rows + i * stride;
    transpose_dwords(row, 0, reinterpret_cast<uint32_t*>(to));
  }
};
