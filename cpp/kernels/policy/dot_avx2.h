// Dot products of codes and int8 by AVX2. Included inside a target's namespace, after ints_256.h.

// acc + words a * b, pairs of them added.
KT_INLINE __m256i dot_words(__m256i acc, __m256i a, __m256i b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
// acc + codes * x, quads of them added. Wide codes are taken as integers, as dot_pairs does.
inline constexpr bool kDotsWideCodes = false;
template <bool kNarrow>
KT_INLINE __m256i dot_quads(__m256i acc, __m256i codes, __m256i x) {
  return dot_words(acc, dot_pairs<kNarrow>(codes, x), _mm256_set1_epi16(1));
}
