// Scales that are bytes, of eight rows at a time, by AVX2. Included inside a target's namespace, after
// ints_256.h.

// Half of the powers of two that bytes are in E8M0; 255 is NaN.
KT_INLINE Floats8 half_of_e8m0(Ints8 bytes) {
  const __m256i bits = _mm256_max_epi32(_mm256_slli_epi32(bytes, 23), _mm256_set1_epi32(0x400000));
  // p - p / 2: infinity, which 255 became, less itself is NaN.
  const __m256 power = _mm256_castsi256_ps(bits);
  return _mm256_fnmadd_ps(power, _mm256_set1_ps(0.5f), power);
}
// The same, but 255 is one of them.
KT_INLINE Floats8 half_of_exponents(Ints8 bytes) {
  const __m256i bits = _mm256_slli_epi32(bytes, 23);
  const __m256i normal = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x800000));
  const __m256i least = _mm256_add_epi32(_mm256_srli_epi32(bits, 2), _mm256_set1_epi32(0x200000));
  return _mm256_castsi256_ps(_mm256_max_epi32(normal, least));
}
// Half of the numbers that bytes are in E4M3.
KT_INLINE Floats8 half_of_e4m3(Ints8 bytes) {
  const __m256i size = _mm256_and_si256(bytes, _mm256_set1_epi32(127));
  const __m256i nan = _mm256_cmpeq_epi32(size, _mm256_set1_epi32(127));
  const __m256i sign = _mm256_slli_epi32(_mm256_sub_epi32(bytes, size), 24);
  // Integers of four bits by powers of two: what begins as a denormal number would take long.
  const __m256i exponent = _mm256_srli_epi32(size, 3);
  const __m256i fraction = _mm256_and_si256(size, _mm256_set1_epi32(7));
  const __m256i is_normal = _mm256_min_epi32(exponent, _mm256_set1_epi32(1));
  const __m256i whole = _mm256_or_si256(fraction, _mm256_slli_epi32(is_normal, 3));
  const __m256i shift = _mm256_sub_epi32(exponent, is_normal);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(shift, _mm256_set1_epi32(127 - 10)), 23);
  const __m256 number = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_castsi256_ps(power));
  return _mm256_or_ps(number, _mm256_castsi256_ps(_mm256_or_si256(sign, nan)));
}
