// The tile unit of AMX. Included inside a target's namespace.
//
// Tiles 0-3 hold C, 4 and 5 weights (A), 6 and 7 activations (B): two by two products a step. The assembler
// is told tile numbers as immediates, since gcc's intrinsics take no template parameters.

// The layout of a tile configuration in memory, as LDTILECFG reads it (palette 1).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Tile {
  static KT_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  static KT_INLINE void release() { asm volatile("tilerelease"); }

  template <int kId>
  static KT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kId));
  }
  template <int kId>
  static KT_INLINE void load(const void* p, ptrdiff_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(kId) : "memory");
  }
  // For what lies in the L2 cache and is not used again soon: L1 keeps what it has.
  template <int kId>
  static KT_INLINE void load_past_l1(const void* p, ptrdiff_t stride_bytes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(kId) : "memory");
  }
  template <int kId>
  static KT_INLINE void store(void* p, ptrdiff_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(kId) : "memory");
  }
  // C += A B on pairs of bf16.
  template <int kC, int kA, int kB>
  static KT_INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
  // C += A B on quads of int8, into int32.
  template <int kC, int kA, int kB>
  static KT_INLINE void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
};
