// 32 bytes, each an integer of its own, in a 256-bit vector. Included inside a target's namespace, after Vec;
// bytes_avx2.h or bytes_avx512.h follows.

#undef KT_INLINE_GROUP
#define KT_INLINE_GROUP KT_INLINE

using Bytes32 = __m256i;

KT_INLINE Bytes32 load_32(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
KT_INLINE void store_32(std::byte* p, Bytes32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
// The nibbles of 16 bytes: the low ones, then the high ones.
KT_INLINE Bytes32 nibbles_of_16(const std::byte* p) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)),
                          _mm256_set1_epi8(15));
}
// The nibbles of 16 bytes in pairs, the low one of a byte first.
KT_INLINE Bytes32 pairs_of_16(const std::byte* p) {
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
}
// The 32 bits of 4 bytes, one per byte.
KT_INLINE Bytes32 spread_bits(const std::byte* p) {
  int bits;
  std::memcpy(&bits, p, sizeof bits);
  const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), of_byte);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  return _mm256_min_epu8(_mm256_and_si256(bytes, bit), _mm256_set1_epi8(1));
}
// low | high << kShift, which fits into a byte.
template <int kShift>
KT_INLINE Bytes32 with_bits(Bytes32 low, Bytes32 high) {
  return _mm256_or_si256(low, _mm256_slli_epi16(high, kShift));
}
KT_INLINE Bytes32 minus(Bytes32 x, int n) {
  return _mm256_sub_epi8(x, _mm256_set1_epi8(static_cast<char>(n)));
}
// table[x] for nibbles x.
KT_INLINE Bytes32 look_up_32(Bytes32 x, const int8_t* table) {
  const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), x);
}
