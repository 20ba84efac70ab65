// What AVX2 does with 32 bytes. Included inside a target's namespace, after bytes_256.h.

// The bits of each byte from `shift` on that are in the mask.
KT_INLINE Bytes32 bits_of(Bytes32 x, size_t shift, int mask) {
  const __m256i shifted = _mm256_srl_epi16(x, _mm_cvtsi32_si128(static_cast<int>(shift)));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(mask)));
}
// Bytes [i, i + kStep) as the codes of a segment.
KT_INLINE Vec::Codes codes_of(Bytes32 x, size_t i) {
  return i == 0 ? _mm256_castsi256_si128(x) : _mm256_extracti128_si256(x, 1);
}
