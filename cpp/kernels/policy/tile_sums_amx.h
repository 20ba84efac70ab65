// The arithmetic of the tile unit's bf16 product on vectors: denormals count as zero there. Included inside a
// target's namespace.

struct TileSums {
  // The vectors' own denormals count as zero for the length of a scope, around calls of functions that are
  // not inlined.
  class FlushDenormals {
   public:
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlush); }
    ~FlushDenormals() { _mm_setcsr(before_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

   private:
    static constexpr unsigned kFlush = 0x8040;  // flush to zero, denormals are zero
    const unsigned before_;
  };
  static KT_INLINE __m512 fused(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
  static KT_INLINE __m512 added(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};
