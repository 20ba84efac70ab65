// Rhs operands of the products that sum over rows: R[s, k] of sum_s L[i, s] R[s, k], its rows interleaved
// in pairs. NN sums over the rows of weights, TN over those of activations. Included inside a target's
// namespace, after its interleave_*-inl.h.
//
// Packed pairs are [groups of 16 columns][pairs of rows][16 dwords], a dword (R[s, k], R[s + 1, k]): a row of
// a group is a cache line, which tiles take as a row of B and vectors as one output per lane. Zeros stand
// behind the last column and, up to a multiple of kPairsStep, behind the last row.

inline constexpr uint32_t kGroupColumns = 16;
inline constexpr size_t kPairsBytes = kGroupColumns * 2 * sizeof(bf16);  // a pair of rows of a group
// Rows that a tile takes at a time: blocks of rows are multiples of it, so that the order of a sum does not
// depend on where blocks end.
inline constexpr uint32_t kPairsStep = 32;
inline constexpr size_t kStepPairsBytes = kPairsStep / 2 * kPairsBytes;
// Rows are about a page apart, out of the reach of the hardware prefetchers.
inline constexpr uint32_t kRowsAhead = 16;

alignas(kCacheLine) inline constexpr std::byte kZeroRow[kMaxNnColumns * sizeof(bf16)] = {};

KT_INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
KT_INLINE uint32_t num_groups(uint32_t columns) {
  return static_cast<uint32_t>(div_up(columns, kGroupColumns));
}

// The maximum number of columns that are packed at a time.
inline constexpr uint32_t kMaxPackedColumns = 256;
static_assert(kMaxTnColumns <= kMaxPackedColumns);

// The number of steps of so many columns that fit into so many bytes.
KT_INLINE uint32_t packed_steps(size_t bytes, uint32_t columns) {
  return static_cast<uint32_t>(bytes / (num_groups(columns) * kStepPairsBytes));
}

// All cache lines of [data, data + bytes).
template <int kHint>
KT_INLINE void prefetch_bytes(const std::byte* data, size_t bytes) {
  const std::byte* line = data - reinterpret_cast<uintptr_t>(data) % kCacheLine;
  for (; line < data + bytes; line += kCacheLine) __builtin_prefetch(line, 0, kHint);
}

struct PackedPairs {
  std::byte* data;
  size_t group_bytes;
};

// Packed pairs at `data` for blocks of so many steps.
KT_INLINE PackedPairs packed_pairs(std::byte* data, uint32_t steps) {
  return {data, steps * kStepPairsBytes};
}

// One pair of rows, `at` bytes into each group.
KT_INLINE void interleave_pair(const std::byte* even, const std::byte* odd, uint32_t columns,
                               const PackedPairs& packed, size_t at) {
  std::byte* group = packed.data + at;
  uint32_t k = 0;
  for (; k + kInterleaveColumns <= columns; k += kInterleaveColumns) {
    interleave_columns(even + k * sizeof(bf16), odd + k * sizeof(bf16), group, packed.group_bytes);
    group += kInterleaveColumns / kGroupColumns * packed.group_bytes;
  }
  if (k < columns)
    interleave_last(even + k * sizeof(bf16), odd + k * sizeof(bf16), columns - k, group, packed.group_bytes);
}

// Zeros from `at` on in each group, up to a whole step: behind an end of rows.
KT_INLINE size_t finish_step(uint32_t columns, const PackedPairs& packed, size_t at) {
  const size_t end = round_up(at, kStepPairsBytes);
  if (end == at) return at;
  for (uint32_t g = 0; g < num_groups(columns); ++g)
    std::memset(packed.data + g * packed.group_bytes + at, 0, end - at);
  return end;
}
