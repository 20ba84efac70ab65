// 512-bit vectors without a bf16 dot product: pairs of bf16 are split into two fp32 vectors and multiplied by
// FMA. Included inside a target's namespace, after vec_avx512_base.h.

struct VecAvx512 : VecAvx512Base {
  // ---- rows-dot-rows products ----
  static constexpr int kTokenTile = 2;  // 16 accumulators + 4 activation and 2 weight halves of 32 registers
  struct Segment {
    __m512 even, odd;
  };
  static KT_INLINE Segment load(const std::byte* p) { return split(_mm512_loadu_si512(p)); }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    return split(load_pairs_partial(p, count));
  }
  static KT_INLINE void store(std::byte* p, const Segment& s) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(s.even), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(s.odd)));
  }
  static KT_INLINE void dot(Acc& acc, const Segment& w, const Segment& x) {
    acc = _mm512_fmadd_ps(w.odd, x.odd, acc);
    acc = _mm512_fmadd_ps(w.even, x.even, acc);
  }

  // ---- codes ----
  static constexpr bool kLooksUpScaled = false;
  struct Numbers {
    alignas(32) uint16_t words[16];
    constexpr void set(int nibble, uint16_t bits) { words[nibble] = bits; }
  };
  static KT_INLINE Segment look_up_segment(const std::byte* nibbles, const int8_t*, const Numbers& numbers) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m512i spread = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));  // one nibble per word
    const __m512i index = _mm512_and_si512(spread, _mm512_set1_epi16(15));
    const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers.words));
    return split(_mm512_permutexvar_epi16(index, _mm512_castsi256_si512(values)));
  }
  // Exact: a code has no more digits than a bf16.
  static KT_INLINE Segment to_segment(Codes codes) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), odd = _mm256_srai_epi16(codes, 8);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(even)), _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(odd))};
  }
  static KT_INLINE Segment to_segment(Codes codes, float scale) { return times(to_segment(codes), scale); }
  static KT_INLINE Segment to_segment(Codes codes, float low, float high) {
    const __m512 first = first_half(codes), second = second_half(codes);
    return segment_of_halves(_mm512_mul_ps(first, _mm512_set1_ps(low)),
                             _mm512_mul_ps(second, _mm512_set1_ps(high)));
  }
  static KT_INLINE Segment times(const Segment& x, float scale) {
    const __m512 s = _mm512_set1_ps(scale);
    return {rounded_bf16(_mm512_mul_ps(x.even, s)), rounded_bf16(_mm512_mul_ps(x.odd, s))};
  }

  // ---- products of pairs ----
  static constexpr int kPairRows = 4, kPairGroups = 4;  // 16 accumulators + 8 rhs and 2 lhs halves
  using Pairs = Segment;
  static KT_INLINE Pairs load_pairs(const std::byte* p) { return load(p); }
  static KT_INLINE Pairs broadcast_pair(uint32_t pair) {
    return split(_mm512_set1_epi32(static_cast<int>(pair)));
  }
  static KT_INLINE void dot_pairs(Acc& acc, const Pairs& lhs, const Pairs& rhs) { dot(acc, lhs, rhs); }

  // ---- elementwise fp32 ----
  static KT_INLINE void store_rounded(std::byte* p, const Float (&x)[2]) {
    store_bf16(reinterpret_cast<bf16*>(p), x[0]);
    store_bf16(reinterpret_cast<bf16*>(p) + kWidth, x[1]);
  }
  static KT_INLINE void store_scaled(std::byte* p, const Float (&x)[2]) { store_rounded(p, x); }

  // ---- for formats with code for this instruction set ----
  // kStep elements in order, rounded.
  static KT_INLINE Segment segment_of_halves(__m512 low, __m512 high) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i even = rounded(_mm512_permutex2var_ps(low, evens, high));
    const __m512i odd = rounded(_mm512_permutex2var_ps(low, odds, high));
    return {_mm512_castsi512_ps(high_words(even)), _mm512_castsi512_ps(high_words(odd))};
  }

 private:
  static KT_INLINE Segment split(__m512i pairs) { return {even_of(pairs), odd_of(pairs)}; }
  static KT_INLINE __m512 rounded_bf16(__m512 x) { return _mm512_castsi512_ps(high_words(rounded(x))); }
};
