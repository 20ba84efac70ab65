// Integers times the factors of their groups as two digits of a byte each, 128 high + low: low is from 0 to
// 127, high signed. Included inside a target's namespace, after ints_256.h.

// Of a block of 256 values, a word for each group.
using GroupFactors = __m512i;
template <size_t kGroups>
KT_INLINE GroupFactors group_factors(const uint64_t* words) {
  return _mm512_zextsi256_si512(group_words<kGroups>(words));
}

// Values [64 g, 64 g + 64) of the block.
template <size_t kGroups>
KT_INLINE void store_digits(const Bytes32 (&integers)[2], GroupFactors factors, size_t g, std::byte* high,
                            std::byte* low) {
  const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(integers[0]), integers[1], 1);
  // A lane of 128 bits has values of one group.
  const __m512i first_group = _mm512_set1_epi16(static_cast<int16_t>(g * kGroups / 4));
  const __m512i of_lane =
      kGroups == 16 ? _mm512_set_epi64(0x0003000300030003, 0x0003000300030003, 0x0002000200020002,
                                       0x0002000200020002, 0x0001000100010001, 0x0001000100010001, 0, 0)
                    : _mm512_set_epi64(0x0001000100010001, 0x0001000100010001, 0x0001000100010001,
                                       0x0001000100010001, 0, 0, 0, 0);
  const __m512i factor = _mm512_permutexvar_epi16(_mm512_add_epi16(of_lane, first_group), factors);
  // Interleaved within lanes, which the packing below undoes.
  const __m512i zero = _mm512_setzero_si512(), seven_bits = _mm512_set1_epi16(127);
  const __m512i words[2] = {_mm512_srai_epi16(_mm512_unpacklo_epi8(zero, bytes), 8),
                            _mm512_srai_epi16(_mm512_unpackhi_epi8(zero, bytes), 8)};
  __m512i products[2];
  KT_UNROLL for (int i = 0; i < 2; ++i) products[i] = _mm512_mullo_epi16(words[i], factor);
  _mm512_storeu_si512(
      high, _mm512_packs_epi16(_mm512_srai_epi16(products[0], 7), _mm512_srai_epi16(products[1], 7)));
  _mm512_storeu_si512(low, _mm512_packs_epi16(_mm512_and_si512(products[0], seven_bits),
                                              _mm512_and_si512(products[1], seven_bits)));
}

// The digits of 16 integers.
struct DigitTable {
  alignas(16) int8_t high[16], low[16];
};
KT_INLINE __m256i table_twice(const int8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}
KT_INLINE __m512i two_tables(const int8_t* first, const int8_t* second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(table_twice(first)), table_twice(second), 1);
}
// Those of 32 nibbles by one table, then of 32 by another.
KT_INLINE void look_up_digits(const Bytes32 (&nibbles)[2], const DigitTable& first, const DigitTable& second,
                              std::byte* high, std::byte* low) {
  const __m512i of_64 = _mm512_inserti64x4(_mm512_castsi256_si512(nibbles[0]), nibbles[1], 1);
  _mm512_storeu_si512(high, _mm512_shuffle_epi8(two_tables(first.high, second.high), of_64));
  _mm512_storeu_si512(low, _mm512_shuffle_epi8(two_tables(first.low, second.low), of_64));
}
