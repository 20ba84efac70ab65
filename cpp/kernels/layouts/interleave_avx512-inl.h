// Two rows of bf16 become one of pairs: dword k is (even[k], odd[k]). Included inside a target's namespace.

// Columns that interleave_columns takes: two groups of 16, the second one group_bytes behind the first.
inline constexpr uint32_t kInterleaveColumns = 32;

// In each quarter, low has its first four columns and high its last four.
struct Interleaved {
  __m512i low, high;
  KT_INLINE Interleaved(__m512i even, __m512i odd)
      : low(_mm512_unpacklo_epi16(even, odd)), high(_mm512_unpackhi_epi16(even, odd)) {}
  KT_INLINE __m512i first16() const {
    return _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
  }
  KT_INLINE __m512i last16() const {
    return _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
  }
};

KT_INLINE void interleave_columns(const std::byte* even, const std::byte* odd, std::byte* to,
                                  size_t group_bytes) {
  const Interleaved pairs(_mm512_loadu_si512(even), _mm512_loadu_si512(odd));
  _mm512_storeu_si512(to, pairs.first16());
  _mm512_storeu_si512(to + group_bytes, pairs.last16());
}

// Fewer columns, zeros behind them; a group without any is not written.
KT_INLINE void interleave_last(const std::byte* even, const std::byte* odd, uint32_t columns, std::byte* to,
                               size_t group_bytes) {
  const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << columns) - 1);
  const Interleaved pairs(_mm512_maskz_loadu_epi16(there, even), _mm512_maskz_loadu_epi16(there, odd));
  _mm512_storeu_si512(to, pairs.first16());
  if (columns > 16) _mm512_storeu_si512(to + group_bytes, pairs.last16());
}
