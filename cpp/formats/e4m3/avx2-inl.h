// E4M3 on 256-bit vectors. Included inside a target's namespace, after its vectors: models E4m3Decoder
// (formats/fp8.h).

struct E4m3 {
  static constexpr bool kDecodesTiles = false;
  // Numbers are converted as float16: the same bits there stand for 2^-8 of the number, and the conversion
  // does not flush denormals.
  static KT_INLINE Vec::Segment segment(const std::byte* p, float scale) {
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi16(127));
    const __m256i is_nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(127));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(128)), 8);
    __m256i half = _mm256_or_si256(_mm256_slli_epi16(size, 7), sign);
    half = _mm256_or_si256(half, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7c00)));
    const __m256i even = _mm256_and_si256(half, _mm256_set1_epi32(0xffff)), odd = _mm256_srli_epi32(half, 16);
    // [even 0-3, odd 0-3 | even 4-7, odd 4-7] -> all even, all odd
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(even, odd), 0xd8);
    return {Vec::rounded_bf16(scaled(_mm256_castsi256_si128(packed), scale)),
            Vec::rounded_bf16(scaled(_mm256_extracti128_si256(packed, 1), scale))};
  }

 private:
  static KT_INLINE __m256 scaled(__m128i halves, float scale) {
    const __m256 numbers = _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256));
    return _mm256_mul_ps(numbers, _mm256_set1_ps(scale));
  }
};
