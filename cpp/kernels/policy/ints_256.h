// Sums of products of codes, eight int32 to a vector, on 256 bits. Included inside a target's namespace,
// after bytes_256.h; a header that defines dot_quads follows.
//
// A code is unsigned and `narrow` up to 129: then pairs of its products with int8 fit into int16.

using Ints8 = __m256i;
using Words16 = __m256i;
using Floats8 = __m256;

KT_INLINE Ints8 zero_ints() { return _mm256_setzero_si256(); }
KT_INLINE Ints8 set_ints(int32_t x) { return _mm256_set1_epi32(x); }
KT_INLINE Ints8 minus_ints(Ints8 a, Ints8 b) { return _mm256_sub_epi32(a, b); }
template <int kShift>
KT_INLINE Ints8 shift_left(Ints8 x) {
  return _mm256_slli_epi32(x, kShift);
}

// Sums of pairs of codes by x. Those of wide codes are taken as integers, 128 less.
template <bool kNarrow>
KT_INLINE Words16 dot_pairs(Bytes32 codes, Bytes32 x) {
  if constexpr (kNarrow) return _mm256_maddubs_epi16(codes, x);
  const __m256i integers = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(integers), _mm256_sign_epi8(x, integers));
}

// The integers of 8 or 16 groups as words; zeros behind eight.
KT_INLINE __m128i sixteen_bytes(const uint64_t* words) {
  return _mm_set_epi64x(static_cast<int64_t>(words[1]), static_cast<int64_t>(words[0]));
}
template <size_t kGroups>
KT_INLINE Words16 group_words(const uint64_t* words) {
  if constexpr (kGroups == 16) {
    return _mm256_cvtepi8_epi16(sixteen_bytes(words));
  } else {
    return _mm256_zextsi128_si256(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(words[0]))));
  }
}
KT_INLINE void store_words(std::byte* p, Words16 x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
template <size_t kGroups>
KT_INLINE Words16 load_sums(const int16_t* sums) {
  if constexpr (kGroups == 16) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sums)));
}

// The same for spread_group: a half has what 16 values need of every 32.
template <size_t kGroups>
KT_INLINE Words16 words_to_spread(const uint64_t* words) {
  if constexpr (kGroups == 16) {
    const __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sixteen_bytes(words), even_odd));
  } else {
    return _mm256_broadcastsi128_si256(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(words[0]))));
  }
}
// The factors of values [32 g, 32 g + 32), a word for each pair.
KT_INLINE Words16 spread_group(Words16 words, size_t g) {
  return _mm256_shuffle_epi8(words, _mm256_set1_epi16(static_cast<int16_t>(0x100 + 0x202 * g)));
}

// Group g's factor of eight, in every lane.
KT_INLINE Ints8 spread_int(uint64_t bytes, size_t g) {
  return _mm256_set1_epi32(static_cast<int8_t>(bytes >> 8 * g));
}
// Those of groups g and g + 1, in the lanes of each half.
KT_INLINE Ints8 eight_ints(uint64_t bytes) {
  return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
}
KT_INLINE Ints8 spread_two_ints(Ints8 of_groups, size_t g) {
  const __m256i half = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_permutevar8x32_epi32(of_groups,
                                     _mm256_add_epi32(half, _mm256_set1_epi32(static_cast<int>(g))));
}
KT_INLINE Ints8 add_products(Ints8 acc, Ints8 a, Ints8 b) {
  return _mm256_add_epi32(acc, _mm256_mullo_epi32(a, b));
}

// 16 bytes from each of two places.
KT_INLINE Bytes32 two_halves(const std::byte* low, const std::byte* high) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(first),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}
KT_INLINE Bytes32 low_nibbles(Bytes32 x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
KT_INLINE Bytes32 high_nibbles(Bytes32 x) {
  return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
}
// The first halves of two vectors, then the second ones.
KT_INLINE void by_halves(Bytes32 a, Bytes32 b, Bytes32 (&x)[2]) {
  x[0] = _mm256_permute2x128_si256(a, b, 0x20), x[1] = _mm256_permute2x128_si256(a, b, 0x31);
}
// The even bytes of two vectors, then the odd ones.
KT_INLINE void by_parity(Bytes32 a, Bytes32 b, Bytes32 (&x)[2]) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  by_halves(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, order), 0xd8),
            _mm256_permute4x64_epi64(_mm256_shuffle_epi8(b, order), 0xd8), x);
}

// The sums of each of eight vectors.
KT_INLINE void sums_of_halves(const Ints8 (&x)[8], Ints8& low, Ints8& high) {
  __m256i fours[2];
  KT_UNROLL for (int i = 0; i < 2; ++i) {
    const __m256i *v = x + 4 * i,
                  a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1])),
                  b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    fours[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  low = _mm256_permute2x128_si256(fours[0], fours[1], 0x20);
  high = _mm256_permute2x128_si256(fours[0], fours[1], 0x31);
}
KT_INLINE __m256i even_lanes(__m256i a, __m256i b) {
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
}
KT_INLINE __m256i odd_lanes(__m256i a, __m256i b) {
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd));
}
// The sums of pairs of lanes of each.
KT_INLINE void sums_of_quarters(const Ints8 (&x)[8], Ints8 (&sums)[4]) {
  __m256i first[2], second[2];  // of each half: of rows 0 to 3, and 4 to 7
  KT_UNROLL for (int i = 0; i < 2; ++i) {
    const __m256i* v = x + 4 * i;
    const __m256i a = _mm256_add_epi32(even_lanes(v[0], v[1]), odd_lanes(v[0], v[1]));
    const __m256i b = _mm256_add_epi32(even_lanes(v[2], v[3]), odd_lanes(v[2], v[3]));
    first[i] = even_lanes(a, b), second[i] = odd_lanes(a, b);
  }
  sums[0] = _mm256_permute2x128_si256(first[0], first[1], 0x20);
  sums[1] = _mm256_permute2x128_si256(second[0], second[1], 0x20);
  sums[2] = _mm256_permute2x128_si256(first[0], first[1], 0x31);
  sums[3] = _mm256_permute2x128_si256(second[0], second[1], 0x31);
}
KT_INLINE Ints8 sums_of_eight(const Ints8 (&x)[8]) {
  Ints8 low, high;
  sums_of_halves(x, low, high);
  return _mm256_add_epi32(low, high);
}

KT_INLINE Bytes32 zero_bytes() { return _mm256_setzero_si256(); }

KT_INLINE Floats8 floats_of(Ints8 x) { return _mm256_cvtepi32_ps(x); }
KT_INLINE Floats8 set_8(float x) { return _mm256_set1_ps(x); }
KT_INLINE Floats8 load_8(const float* p) { return _mm256_loadu_ps(p); }
KT_INLINE void store_8(float* p, Floats8 x) { _mm256_storeu_ps(p, x); }
KT_INLINE Floats8 mul_8(Floats8 a, Floats8 b) { return _mm256_mul_ps(a, b); }
KT_INLINE Floats8 fma_8(Floats8 a, Floats8 b, Floats8 c) { return _mm256_fmadd_ps(a, b, c); }

// Eight numbers of two bytes, `stride` bytes apart.
KT_INLINE __m128i eight_words(const std::byte* p, ptrdiff_t stride) {
  uint16_t w[8];
  KT_UNROLL for (ptrdiff_t r = 0; r < 8; ++r) std::memcpy(w + r, p + r * stride, sizeof *w);
  return _mm_setr_epi16(static_cast<int16_t>(w[0]), static_cast<int16_t>(w[1]), static_cast<int16_t>(w[2]),
                        static_cast<int16_t>(w[3]), static_cast<int16_t>(w[4]), static_cast<int16_t>(w[5]),
                        static_cast<int16_t>(w[6]), static_cast<int16_t>(w[7]));
}
KT_INLINE Floats8 eight_halves(const std::byte* p, ptrdiff_t stride) {
  return _mm256_cvtph_ps(eight_words(p, stride));
}

KT_INLINE Floats8 eight_bf16(const std::byte* p, ptrdiff_t stride) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_words(p, stride)), 16));
}

// Four bytes of each of eight rows: the scales of a block, from which `kSize` bytes at a time are taken.
KT_INLINE Ints8 eight_dwords(const std::byte* p, ptrdiff_t stride) {
  int32_t d[8];
  KT_UNROLL for (ptrdiff_t r = 0; r < 8; ++r) std::memcpy(d + r, p + r * stride, sizeof *d);
  return _mm256_setr_epi32(d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]);
}
// Byte i of each as a number of a format whose scales are bytes.
KT_INLINE Ints8 byte_of_dwords(Ints8 x, size_t i) {
  return _mm256_and_si256(_mm256_srl_epi32(x, _mm_cvtsi32_si128(static_cast<int>(8 * i))),
                          _mm256_set1_epi32(255));
}
// bf16 number i of each.
KT_INLINE Floats8 bf16_of_dwords(Ints8 x, size_t i) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm256_castsi256_ps(i == 0 ? _mm256_slli_epi32(x, 16) : _mm256_and_si256(x, high));
}
KT_INLINE Ints8 eight_bytes(const std::byte* p, ptrdiff_t stride) {
  char b[8];
  KT_UNROLL for (ptrdiff_t r = 0; r < 8; ++r) std::memcpy(b + r, p + r * stride, 1);
  return _mm256_cvtepu8_epi32(
      _mm_setr_epi8(b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], 0, 0, 0, 0, 0, 0, 0, 0));
}
