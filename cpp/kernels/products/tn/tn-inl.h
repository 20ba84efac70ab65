// TN, common to vectors and tiles: D[n, k] (+)= scale * sum_m G[m, n] X[m, k], block by block of m.
//
// Rows of both, gathered, are interleaved in pairs (pairs-inl.h). X then has the role of W in NN; Product
// converts G to its lhs operand. Sums are kept in scratch and written to D at the end. Included inside a
// target's namespace, after its nn_*-inl.h and transpose_*-inl.h.

inline constexpr size_t kTnPackedBytes = size_t{64} << 10;  // of X: with the sums it stays in the cache
inline constexpr uint32_t kTnBlockRows = 512;  // at most: blocks of G are small beside the packed X
inline constexpr size_t kTnLhsBytes = size_t{kMaxTnRows} * kTnBlockRows * sizeof(bf16);
inline constexpr size_t kTnSumBytes = size_t{kMaxTnRows} * kMaxTnColumns * sizeof(float);
inline constexpr size_t kTnScratchBytes = kTnPackedBytes + kTnLhsBytes + kTnSumBytes;

// Interleaves rows [s0, s1), `columns` of each.
inline void fill_pairs(const RowsView& rows, uint32_t s0, uint32_t s1, uint32_t columns,
                       const PackedPairs& packed) {
  const auto row = [&](uint32_t s) {
    const size_t at = rows.index ? rows.index[s] : s;
    return reinterpret_cast<const std::byte*>(rows.data + at * rows.stride);
  };
  size_t at = 0;
  for (uint32_t s = s0; s < s1; s += 2, at += kPairsBytes) {
    for (uint32_t ahead = s + kRowsAhead; ahead < smaller(s1, s + kRowsAhead + 2); ++ahead)
      prefetch_bytes<3>(row(ahead), columns * sizeof(bf16));
    interleave_pair(row(s), s + 1 < s1 ? row(s + 1) : kZeroRow, columns, packed, at);
  }
  finish_step(columns, packed, at);
}

// Scaled sums, row-major, to a D with adjacent columns.
KT_INLINE void store_sums_rows(const TnArgs& a, const float* sums, size_t stride) {
  for (uint32_t n = 0; n < a.n; ++n) {
    const float* from = sums + n * stride;
    float* to = a.d + n * a.n_stride;
    if (!a.accumulate) {
      std::memcpy(to, from, a.k * sizeof(float));
      continue;
    }
    uint32_t k = 0;
    for (; k + Vec::kWidth <= a.k; k += Vec::kWidth)
      Vec::store_f(to + k, Vec::add(Vec::load_f(to + k), Vec::load_f(from + k)));
    for (; k < a.k; ++k) to[k] += from[k];
  }
}

// D with any strides, [n0, n1) x [k0, k1) of it.
KT_INLINE void store_sums_any(const TnArgs& a, const float* sums, size_t stride, uint32_t n0, uint32_t n1,
                              uint32_t k0, uint32_t k1) {
  for (uint32_t n = n0; n < n1; ++n) {
    for (uint32_t k = k0; k < k1; ++k) {
      float* to = a.d + n * a.n_stride + k * a.k_stride;
      *to = a.accumulate ? *to + sums[n * stride + k] : sums[n * stride + k];
    }
  }
}

// A D with adjacent rows, by transposing 16 x 16 blocks.
inline void store_sums_columns(const TnArgs& a, const float* sums, size_t stride) {
  constexpr uint32_t kSide = 16;
  alignas(kCacheLine) float block[kSide * kSide];
  const uint32_t whole_n = a.n / kSide * kSide, whole_k = a.k / kSide * kSide;
  for (uint32_t n = 0; n < whole_n; n += kSide) {
    for (uint32_t k = 0; k < whole_k; k += kSide) {
      const std::byte* row[kSide];
      for (uint32_t i = 0; i < kSide; ++i)
        row[i] = reinterpret_cast<const std::byte*>(sums + (n + i) * stride + k);
      float* to = a.d + n + k * a.k_stride;
      if (!a.accumulate) {
        transpose_dwords(row, 0, reinterpret_cast<uint32_t*>(to), a.k_stride);
        continue;
      }
      transpose_dwords(row, 0, reinterpret_cast<uint32_t*>(block), kSide);
      for (uint32_t j = 0; j < kSide; ++j, to += a.k_stride)
        for (uint32_t i = 0; i < kSide; i += Vec::kWidth)
          Vec::store_f(to + i, Vec::add(Vec::load_f(to + i), Vec::load_f(block + j * kSide + i)));
    }
  }
  store_sums_any(a, sums, stride, 0, whole_n, whole_k, a.k);
  store_sums_any(a, sums, stride, whole_n, a.n, 0, a.k);
}

// `sums` has whole vectors per row, and is scaled in place.
inline void store_sums(const TnArgs& a, float* sums, size_t stride) {
  const Float scale = Vec::set(a.scale);
  for (size_t i = 0; i < a.n * stride; i += Vec::kWidth)
    Vec::store_f(sums + i, Vec::mul(scale, Vec::load_f(sums + i)));
  if (a.k_stride == 1) return store_sums_rows(a, sums, stride);
  if (a.n_stride == 1) return store_sums_columns(a, sums, stride);
  store_sums_any(a, sums, stride, 0, a.n, 0, a.k);
}

// The operands of a Product: a block of both, interleaved, `length` rows.
struct TnBlock {
  PackedPairs g, x;
  uint32_t n, k, length;
  float* sums;
  size_t stride;
  std::byte* scratch;  // Product's own
};

template <class Product>
void tn_product(const TnArgs& a) {
  std::byte* lhs = a.scratch + kTnPackedBytes;
  float* sums = reinterpret_cast<float*>(lhs + kTnLhsBytes);
  const size_t stride = round_up(a.k, kGroupColumns);
  const uint32_t steps = smaller(packed_steps(kTnPackedBytes, a.k), kTnBlockRows / kPairsStep);
  const PackedPairs x_packed = packed_pairs(a.scratch, steps), g_packed = packed_pairs(lhs, steps);
  const uint32_t block = steps * kPairsStep;
  std::memset(sums, 0, a.n * stride * sizeof(float));
  Product product;
  for (uint32_t m0 = 0; m0 < a.m; m0 += block) {
    const uint32_t m1 = smaller(a.m, m0 + block);
    fill_pairs(a.x, m0, m1, a.k, x_packed);
    fill_pairs(a.g, m0, m1, a.n, g_packed);
    product.add({g_packed, x_packed, a.n, a.k, m1 - m0, sums, stride, a.scratch + kTnScratchBytes});
  }
  store_sums(a, sums, stride);
}
