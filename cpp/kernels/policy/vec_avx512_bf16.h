// 512-bit vectors with the bf16 dot product and VBMI. Included inside a target's namespace, after
// vec_avx512_base.h.

struct VecAvx512Bf16 : VecAvx512Base {
  // ---- rows-dot-rows products ----
  static constexpr int kTokenTile = 3;  // 24 accumulators + 3 activations + 1 weight of 32 registers
  using Segment = __m512bh;
  static KT_INLINE Segment load(const std::byte* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    return (__m512bh)load_pairs_partial(p, count);
  }
  static KT_INLINE void store(std::byte* p, Segment s) { _mm512_storeu_si512(p, (__m512i)s); }
  static KT_INLINE void dot(Acc& acc, Segment w, Segment x) { acc = _mm512_dpbf16_ps(acc, x, w); }

  // ---- codes ----
  // The conversion flushes denormals to zero, as the dot product does.
  static KT_INLINE Segment to_segment(Codes codes) {
    return _mm512_cvtne2ps_pbh(second_half(codes), first_half(codes));
  }
  static KT_INLINE Segment to_segment(Codes codes, float scale) {
    const __m512 s = _mm512_set1_ps(scale);
    return _mm512_cvtne2ps_pbh(_mm512_mul_ps(second_half(codes), s), _mm512_mul_ps(first_half(codes), s));
  }
  static KT_INLINE Segment times(Segment x, float scale) {
    const __m512 s = _mm512_set1_ps(scale);
    const __m512 even = even_of((__m512i)x), odd = odd_of((__m512i)x);
    const __m512i low = _mm512_srli_epi32(rounded(_mm512_mul_ps(even, s)), 16);
    return (__m512bh)_mm512_or_si512(low, high_words(rounded(_mm512_mul_ps(odd, s))));
  }

  // ---- lookup tables of scaled numbers ----
  static constexpr bool kLooksUpScaled = true;
  // VBMI looks up bytes twice as fast as words: the upper byte of a number lies 16 behind the lower one, so
  // bit 4 of an index selects the byte. The table is there twice, so bit 5 may be anything.
  struct Numbers {
    alignas(64) uint8_t bytes[64];
    constexpr void set(int nibble, uint16_t bits) {
      bytes[nibble] = bytes[nibble + 32] = static_cast<uint8_t>(bits);
      bytes[nibble + 16] = bytes[nibble + 48] = static_cast<uint8_t>(bits >> 8);
    }
  };
  static KT_INLINE Segment look_up_segment(const std::byte* nibbles, const int8_t*, const Numbers& numbers) {
    return look_up_bytes(nibbles, _mm512_load_si512(numbers.bytes), _mm512_set1_epi16(16 << 8));
  }
  // Byte i of the segment is table[nibble | select[i]], with the nibble of element i / 2.
  static KT_INLINE Segment look_up_bytes(const std::byte* nibbles, Bytes table, Bytes select) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m512i four = _mm512_permutexvar_epi8(four_of_each(), bytes);
    const __m512i shifted = _mm512_srlv_epi16(four, _mm512_set1_epi32(4 << 16));
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const __m512i index = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(15), select, kAndOr);
    return (__m512bh)_mm512_permutexvar_epi8(index, table);
  }
  static KT_INLINE Segment look_up_floats(const std::byte* nibbles, const Float (&numbers)[1]) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m512i four = _mm512_permutexvar_epi8(four_of_each(), bytes);
    return look_up_rotated(_mm512_shldv_epi16(four, four, _mm512_set1_epi32(13 << 16 | 1)), numbers[0]);
  }
  // bf(numbers[nibble]): bits 1 to 4 of both bytes of a word are its nibble, the others are ignored.
  static KT_INLINE Segment look_up_rotated(Bytes words, Float numbers) {
    const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(numbers));
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const __m512i index =
        _mm512_ternarylogic_epi32(words, _mm512_set1_epi8(30), _mm512_set1_epi16(1 << 8), kAndOr);
    return (__m512bh)_mm512_permutexvar_epi8(index, table);
  }

  // ---- products of pairs ----
  static constexpr int kPairRows = 6, kPairGroups = 4;  // 24 accumulators + 4 rhs + 1 lhs of 32 registers
  using Pairs = Segment;
  static KT_INLINE Pairs load_pairs(const std::byte* p) { return load(p); }
  static KT_INLINE Pairs broadcast_pair(uint32_t pair) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
  }
  static KT_INLINE void dot_pairs(Acc& acc, const Pairs& lhs, const Pairs& rhs) { dot(acc, lhs, rhs); }

  // ---- elementwise fp32 ----
  static KT_INLINE void store_rounded(std::byte* p, const Float (&x)[2]) {
    store(p, segment_of_halves(x[0], x[1]));
  }
  static KT_INLINE void store_scaled(std::byte* p, const Float (&x)[2]) { store_rounded(p, x); }

  // ---- for formats with code for this instruction set ----
  // kStep elements in order, rounded.
  static KT_INLINE Segment segment_of_halves(__m512 low, __m512 high) {
    return _mm512_cvtne2ps_pbh(high, low);
  }

 private:
  // Bytes 0 to 15, each four times.
  static KT_INLINE __m512i four_of_each() {
    return _mm512_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606,
                             0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c,
                             0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
  }
};
