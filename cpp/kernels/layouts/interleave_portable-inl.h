// Two rows of bf16 become one of pairs: dword k is (even[k], odd[k]). Included inside a target's namespace.

// Columns that interleave_columns takes, one group of 16.
inline constexpr uint32_t kInterleaveColumns = 16;

KT_INLINE void interleave_columns(const std::byte* even, const std::byte* odd, std::byte* to, size_t) {
  uint16_t pair[2 * kInterleaveColumns], a[kInterleaveColumns], b[kInterleaveColumns];
  std::memcpy(a, even, sizeof a);
  std::memcpy(b, odd, sizeof b);
  for (uint32_t k = 0; k < kInterleaveColumns; ++k) pair[2 * k] = a[k], pair[2 * k + 1] = b[k];
  std::memcpy(to, pair, sizeof pair);
}

// Fewer columns, zeros behind them.
inline void interleave_last(const std::byte* even, const std::byte* odd, uint32_t columns, std::byte* to,
                            size_t group_bytes) {
  std::byte a[2 * kInterleaveColumns] = {}, b[2 * kInterleaveColumns] = {};
  std::memcpy(a, even, columns * sizeof(bf16));
  std::memcpy(b, odd, columns * sizeof(bf16));
  interleave_columns(a, b, to, group_bytes);
}
