// What the machine can do at most with this instruction set: reading memory, and products with and without
// the loads that feed them. Included inside a target's namespace, after the policy.

inline uint64_t limit_read(const std::byte* data, size_t bytes) {
  constexpr size_t kStride = 256, kAhead = 4096;
  Vec::Sum sum[4] = {};
  for (size_t i = 0; i + kStride <= bytes; i += kStride) {
    __builtin_prefetch(data + i + kAhead, 0, 2);
    KT_UNROLL for (int j = 0; j < 4; ++j) Vec::add_to(sum[j], data + i + j * 64);
  }
  for (int j = 0; j < 4; ++j) asm volatile("" ::"m"(sum[j]));
  return bytes;
}

// Independent chains of dot products, as many as hide their latency. Each begins with another value that the
// compiler cannot know, or it would see that all chains are the same.
inline double limit_dot_rows(uint64_t iterations) {
  alignas(64) std::byte numbers[(Vec::kPeakChains + 2) * 64];
  std::memset(numbers, 0x3c, sizeof numbers);
  const std::byte* unknown = numbers;
  asm volatile("" : "+r"(unknown) : : "memory");
  const Vec::Segment w = Vec::load(unknown), x = Vec::load(unknown + 64);
  Vec::Acc acc[Vec::kPeakChains];
  KT_UNROLL for (int j = 0; j < Vec::kPeakChains; ++j) {
    acc[j] = Vec::zero_acc();
    Vec::dot(acc[j], Vec::load(unknown + (j + 2) * 64), x);
  }
  for (uint64_t i = 0; i < iterations; ++i) {
    KT_UNROLL for (int j = 0; j < Vec::kPeakChains; ++j) Vec::dot(acc[j], w, x);
  }
  Vec::Acc sum = Vec::zero_acc();
  KT_UNROLL for (int j = 0; j < Vec::kPeakChains; ++j) sum = Vec::add_acc(sum, acc[j]);
  asm volatile("" ::"m"(sum));
  return 2.0 * Vec::kStep * Vec::kPeakChains * static_cast<double>(iterations);
}

// The register tile of nt_rows.h with its loads, over operands that stay in the first-level cache.
inline double limit_step_rows(uint64_t iterations, std::byte* cached_32k) {
  constexpr int kRows = Vec::kRowTile, kTokens = Vec::kTokenTile;
  constexpr size_t kSteps = 16;
  Vec::Acc acc[kTokens][kRows];
  KT_UNROLL for (int t = 0; t < kTokens; ++t) {
    KT_UNROLL for (int r = 0; r < kRows; ++r) acc[t][r] = Vec::zero_acc();
  }
  for (uint64_t i = 0; i < iterations; ++i) {
    const std::byte* at = cached_32k + i % kSteps * (kRows + kTokens) * 64;
    Vec::Segment xs[kTokens];
    KT_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = Vec::load(at + (kRows + t) * 64);
    KT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec::Segment w = Vec::load(at + r * 64);
      KT_UNROLL for (int t = 0; t < kTokens; ++t) Vec::dot(acc[t][r], w, xs[t]);
    }
  }
  Vec::Acc sum = Vec::zero_acc();
  KT_UNROLL for (int t = 0; t < kTokens; ++t) {
    KT_UNROLL for (int r = 0; r < kRows; ++r) sum = Vec::add_acc(sum, acc[t][r]);
  }
  asm volatile("" ::"m"(sum));
  return 2.0 * Vec::kStep * kRows * kTokens * static_cast<double>(iterations);
}
