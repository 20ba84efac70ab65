// Dot products of codes and int8 by AVX2. Included inside a target's namespace, before ints_256.h.

// acc + words a * b, pairs of them added.
KT_INLINE __m256i dot_words(__m256i acc, __m256i a, __m256i b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
// acc + codes * x, quads of them added. Pairs of products of wide codes would not fit into int16: they are
// taken as integers, 128 less, and the sign of each goes to its factor.
inline constexpr bool kDotsWideCodes = false;
template <bool kNarrow>
KT_INLINE __m256i dot_quads(__m256i acc, __m256i codes, __m256i x) {
  __m256i pairs;
  if constexpr (kNarrow) {
    pairs = _mm256_maddubs_epi16(codes, x);
  } else {
    const __m256i integers = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(integers), _mm256_sign_epi8(x, integers));
  }
  return dot_words(acc, pairs, _mm256_set1_epi16(1));
}
