// NVFP4 by lookup tables, with VBMI: a vector spans two groups of a row. Included inside a target's
// namespace, after its vectors.

// kStep nibbles: the first half looked up in one table, the second in another.
KT_INLINE Vec::Segment look_up_two(const std::byte* nibbles, const Vec::Numbers& low,
                                   const Vec::Numbers& high) {
  const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(low.bytes));
  const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(high.bytes));
  const __m512i tables = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  const __m512i upper_half = _mm512_maskz_set1_epi8(0xffffffff00000000u, 32);
  return Vec::look_up_bytes(nibbles, tables, _mm512_or_si512(_mm512_set1_epi16(16 << 8), upper_half));
}
