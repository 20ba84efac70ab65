// Two rows of bf16 become one of pairs: dword k is (even[k], odd[k]). Included inside a target's namespace.

// Columns that interleave_columns takes, one group of 16.
inline constexpr uint32_t kInterleaveColumns = 16;

KT_INLINE void interleave_columns(const std::byte* even, const std::byte* odd, std::byte* to, size_t) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
  // Columns 0-3 and 8-11, 4-7 and 12-15.
  const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
  __m256i* pairs = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(pairs, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(pairs + 1, _mm256_permute2x128_si256(low, high, 0x31));
}

// Fewer columns, zeros behind them.
inline void interleave_last(const std::byte* even, const std::byte* odd, uint32_t columns, std::byte* to,
                            size_t group_bytes) {
  alignas(32) std::byte a[2 * kInterleaveColumns] = {}, b[2 * kInterleaveColumns] = {};
  std::memcpy(a, even, columns * sizeof(bf16));
  std::memcpy(b, odd, columns * sizeof(bf16));
  interleave_columns(a, b, to, group_bytes);
}
