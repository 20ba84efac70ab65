// Dot products of codes and int8 by AVX-VNNI. Included inside a target's namespace, after ints_256.h.

// acc + words a * b, pairs of them added.
KT_INLINE __m256i dot_words(__m256i acc, __m256i a, __m256i b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }
// acc + codes * x, quads of them added.
inline constexpr bool kDotsWideCodes = true;
template <bool kNarrow>
KT_INLINE __m256i dot_quads(__m256i acc, __m256i codes, __m256i x) {
  return _mm256_dpbusd_avx_epi32(acc, codes, x);
}
