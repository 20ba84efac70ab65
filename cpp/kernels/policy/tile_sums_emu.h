// The arithmetic of the emulated tile unit's bf16 product on vectors, as tile_sums_amx.h. Included inside a
// target's namespace, after tile_emu.h and its vectors.

struct TileSums {
  struct FlushDenormals {
    FlushDenormals() {}  // every step does it
  };
  // Not inlined: unrolled loops of these would take minutes to compile.
  static __attribute__((noinline)) Vec::Float fused(const Vec::Float& a, const Vec::Float& b,
                                                    Vec::Float sum) {
    for (size_t i = 0; i < Vec::kWidth; ++i)
      sum.lane[i] = fused_step(flush_denormal(a.lane[i]), flush_denormal(b.lane[i]), sum.lane[i]);
    return sum;
  }
  static __attribute__((noinline)) Vec::Float added(const Vec::Float& a, Vec::Float b) {
    for (size_t i = 0; i < Vec::kWidth; ++i)
      b.lane[i] = flush_denormal(flush_denormal(a.lane[i]) + flush_denormal(b.lane[i]));
    return b;
  }
};
