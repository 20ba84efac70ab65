// What AVX-512 does with 32 bytes. Included inside a target's namespace, after bytes_256.h.

// The bits of each byte from `shift` on that are in the mask.
KT_INLINE Bytes32 bits_of(Bytes32 x, size_t shift, int mask) {
  const __m256i shifted = _mm256_srlv_epi16(x, _mm256_set1_epi16(static_cast<short>(shift)));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(mask)));
}
// All bytes are the codes of one segment.
KT_INLINE Vec::Codes codes_of(Bytes32 x, size_t) { return x; }
