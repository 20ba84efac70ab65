// What the machine can do at most with this instruction set: reading memory, and products with and without
// the loads that feed them. Included inside a target's namespace, after the policy.

// Makes the compiler treat a value as used. A copy, so that the value itself need not stay in memory.
template <class Value>
KT_INLINE void use(Value value) {
  asm volatile("" ::"m"(value));
}

inline uint64_t limit_read(const std::byte* data, size_t bytes) {
  constexpr size_t kStride = 256, kAhead = 4096;
  Vec::Sum sum[4] = {};
  for (size_t i = 0; i + kStride <= bytes; i += kStride) {
    __builtin_prefetch(data + i + kAhead, 0, 2);
    KT_UNROLL for (int j = 0; j < 4; ++j) Vec::add_to(sum[j], data + i + j * 64);
  }
  for (int j = 0; j < 4; ++j) use(sum[j]);
  return bytes;
}

// Independent chains of dot products, as many as hide their latency. Each begins with another value that the
// compiler cannot know, or it would see that all chains are the same.
template <class Product>
double limit_dot_rows(uint64_t iterations) {
  alignas(64) std::byte numbers[(Vec::kPeakChains + 2) * 64];
  std::memset(numbers, 0x3c, sizeof numbers);
  const std::byte* unknown = numbers;
  asm volatile("" : "+r"(unknown) : : "memory");
  const typename Product::Segment w = Product::load(unknown), x = Product::load(unknown + 64);
  typename Product::Acc acc[Vec::kPeakChains];
  KT_UNROLL for (int j = 0; j < Vec::kPeakChains; ++j) {
    acc[j] = Product::zero();
    Product::dot(acc[j], Product::load(unknown + (j + 2) * 64), x);
  }
  for (uint64_t i = 0; i < iterations; ++i) {
    asm volatile("" : : : "memory");
    KT_UNROLL for (int j = 0; j < Vec::kPeakChains; ++j) {
      // Where a product is several instructions, chains would share all but the last one.
      const bool shared = Product::kElementBytes == sizeof(bf16);
      Product::dot(acc[j], w, shared ? x : Product::load(unknown + (j + 2) * 64));
    }
  }
  KT_UNROLL for (int j = 0; j < Vec::kPeakChains; ++j) use(acc[j]);
  return 2.0 * Product::kStep * Vec::kPeakChains * static_cast<double>(iterations);
}

// The register tile of nt_rows-inl.h with its loads, over operands that stay in the L1 cache.
template <class Product>
double limit_step_rows(uint64_t iterations, std::byte* cached_32k) {
  constexpr int kRows = Vec::kRowTile, kTokens = Vec::kTokenTile;
  constexpr size_t kSteps = 16;
  typename Product::Acc acc[kTokens][kRows];
  KT_UNROLL for (int t = 0; t < kTokens; ++t) {
    KT_UNROLL for (int r = 0; r < kRows; ++r) acc[t][r] = Product::zero();
  }
  for (uint64_t i = 0; i < iterations; ++i) {
    const std::byte* at = cached_32k + i % kSteps * (kRows + kTokens) * 64;
    typename Product::Segment xs[kTokens];
    KT_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = Product::load(at + (kRows + t) * 64);
    KT_UNROLL for (int r = 0; r < kRows; ++r) {
      const typename Product::Segment w = Product::load(at + r * 64);
      KT_UNROLL for (int t = 0; t < kTokens; ++t) Product::dot(acc[t][r], w, xs[t]);
    }
  }
  KT_UNROLL for (int t = 0; t < kTokens; ++t) { KT_UNROLL for (int r = 0; r < kRows; ++r) use(acc[t][r]); }
  return 2.0 * Product::kStep * kRows * kTokens * static_cast<double>(iterations);
}
