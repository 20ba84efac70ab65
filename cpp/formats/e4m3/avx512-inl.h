// E4M3 on 512-bit vectors. Included inside a target's namespace, after its vectors: models E4m3Decoder
// (formats/fp8.h).

struct E4m3Avx512 {
  static constexpr bool kDecodesTiles = false;
  // Numbers are converted as float16: the same bits there stand for 2^-8 of the number, and the conversion
  // does not flush denormals.
  static KT_INLINE Vec::Segment segment(const std::byte* p, float scale) {
    const __m512i bits = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi16(127));
    const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(127));
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    const __m512i half = _mm512_ternarylogic_epi32(_mm512_slli_epi16(size, 7), _mm512_slli_epi16(bits, 8),
                                                   _mm512_set1_epi16(-32768), kOrAnd);
    const __m512i number = _mm512_mask_mov_epi16(half, is_nan, _mm512_set1_epi16(0x7e00));
    const __m512 s = _mm512_set1_ps(scale), larger = _mm512_set1_ps(256);
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(number));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(number, 1));
    return Vec::segment_of_halves(_mm512_mul_ps(_mm512_mul_ps(low, larger), s),
                                  _mm512_mul_ps(_mm512_mul_ps(high, larger), s));
  }
};
