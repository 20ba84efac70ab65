// 32 whole numbers of a byte each, in a vector of 256 bits. Included inside a target's namespace, after Vec.

#undef KT_INLINE_GROUP
#define KT_INLINE_GROUP KT_INLINE

using Bytes32 = __m256i;

KT_INLINE Bytes32 load_32(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
// The nibbles of 16 bytes: the low ones, then the high ones.
KT_INLINE Bytes32 nibbles_of_16(const std::byte* p) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)),
                          _mm256_set1_epi8(15));
}
// Bits of each from `shift` on, those of a mask.
KT_INLINE Bytes32 bits_of(Bytes32 x, size_t shift, int mask) {
  const __m256i shifted = Vec::shift_right(x, static_cast<int>(shift));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(mask)));
}
// Every bit of 4 bytes.
KT_INLINE Bytes32 spread_bits(const std::byte* p) {
  int bits;
  std::memcpy(&bits, p, sizeof bits);
  const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), of_byte);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  return _mm256_min_epu8(_mm256_and_si256(bytes, bit), _mm256_set1_epi8(1));
}
// low | high << kShift, where that has no more than a byte.
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
// Numbers [i, i + kStep) as the codes of a segment.
KT_INLINE Vec::Codes codes_of(Bytes32 x, size_t i) { return Vec::codes_of(x, i); }

// Nibbles as they are packed, to be looked up.
#if KT_HAS_AVX512_BF16
struct Nibbles32 {
  __m512i twice;  // every byte in both bytes of a word
  __m512i left;   // by how many bits a word is turned for its nibble to be in bits 1 to 4 of both
};
// Of 16 bytes: the low ones, then the high ones.
KT_INLINE Nibbles32 packed_in_16(const std::byte* p) {
  const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m128i low = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m256i both = _mm256_setr_m128i(low, _mm_add_epi8(low, _mm_set1_epi8(8)));
  const __m512i order = _mm512_inserti64x4(_mm512_castsi256_si512(both), both, 1);
  const __m512i left = _mm512_mask_set1_epi16(_mm512_set1_epi16(1), 0xffff0000u, 13);
  return {_mm512_shuffle_epi8(four, order), left};
}
// The low or the high ones of 32 bytes.
KT_INLINE Nibbles32 packed_in_32(const std::byte* p, bool high) {
  const __m512i order = _mm512_setr_epi32(
      0x01010000, 0x03030202, 0x05050404, 0x07070606, 0x09090808, 0x0b0b0a0a, 0x0d0d0c0c, 0x0f0f0e0e,
      0x11111010, 0x13131212, 0x15151414, 0x17171616, 0x19191818, 0x1b1b1a1a, 0x1d1d1c1c, 0x1f1f1e1e);
  return {_mm512_permutexvar_epi8(order, _mm512_castsi256_si512(load_32(p))),
          _mm512_set1_epi16(high ? 13 : 1)};
}
// bf(table[nibble]) of each.
KT_INLINE void store_looked_up(std::byte* to, const Nibbles32& x, Vec::Float table) {
  const __m512i turned = _mm512_shldv_epi16(x.twice, x.twice, x.left);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi8(Vec::word_index(turned), Vec::words_of(table)));
}
#endif
