// Vectors of 512 bits. Included inside a target's namespace; KT_HAS_AVX512_BF16 says whether the target has
// the bf16 dot product, else bf16 pairs are split into two fp32 vectors and multiplied by FMA.

struct Vec {
  // ---- rows-dot-rows products ----
  static constexpr size_t kStep = 32;
  static constexpr int kRowTile = 8;
  using Acc = __m512;
  static KT_INLINE Acc zero_acc() { return _mm512_setzero_ps(); }

#if KT_HAS_AVX512_BF16
  static constexpr int kTokenTile = 3;  // 24 accumulators + 3 activations + 1 weight of 32 registers
  using Segment = __m512bh;
  static KT_INLINE Segment as_segment(__m512i pairs) { return (__m512bh)pairs; }
  static KT_INLINE Segment load(const std::byte* p) { return as_segment(_mm512_loadu_si512(p)); }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
  }
  static KT_INLINE void store(std::byte* p, Segment s) { _mm512_storeu_si512(p, (__m512i)s); }
  static KT_INLINE void dot(Acc& acc, Segment w, Segment x) { acc = _mm512_dpbf16_ps(acc, x, w); }
#else
  static constexpr int kTokenTile = 2;  // 16 accumulators + 4 activation and 2 weight halves
  struct Segment {
    __m512 even, odd;
  };
  static KT_INLINE Segment split(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static KT_INLINE Segment as_segment(__m512i pairs) { return split(pairs); }
  static KT_INLINE Segment load(const std::byte* p) { return split(_mm512_loadu_si512(p)); }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    return split(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p));
  }
  static KT_INLINE void store(std::byte* p, const Segment& s) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(s.even), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(s.odd)));
  }
  static KT_INLINE void dot(Acc& acc, const Segment& w, const Segment& x) {
    acc = _mm512_fmadd_ps(w.odd, x.odd, acc);
    acc = _mm512_fmadd_ps(w.even, x.even, acc);
  }
#endif

  // Lane i with i + 8, then i + 4, i + 2, i + 1: the same tree for one sum as for eight.
  static KT_INLINE void reduce(const Acc (&acc)[1], float* out) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(acc[0]), _mm512_extractf32x8_ps(acc[0], 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    out[0] = _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static KT_INLINE void reduce(const Acc (&acc)[8], float* out) {
    const __m512 ab = fold8(acc[0], acc[1]), cd = fold8(acc[2], acc[3]);
    const __m512 ef = fold8(acc[4], acc[5]), gh = fold8(acc[6], acc[7]);
    // [a a b b] + [c c d d] quarters -> [a b c d], each quarter four lanes of one sum
    const __m512 abcd = fold4(ab, cd), efgh = fold4(ef, gh);
    const __m512 pairs = _mm512_add_ps(as_ps(_mm512_unpacklo_pd(as_pd(abcd), as_pd(efgh))),
                                       as_ps(_mm512_unpackhi_pd(as_pd(abcd), as_pd(efgh))));
    // quarters [a0 a1 e0 e1] [b0 b1 f0 f1] [c .. g ..] [d .. h ..]
    const __m512 sums = _mm512_add_ps(pairs, _mm512_movehdup_ps(pairs));
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(reduced_order(), sums)));
  }

  // ---- int8 codes ----
  using Codes = __m256i;
  static KT_INLINE Codes no_codes() { return _mm256_setzero_si256(); }
  static KT_INLINE Codes load_codes(const std::byte* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static KT_INLINE Codes load_codes_partial(const std::byte* p, size_t count) {
    return _mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
  }
  // table[nibble] for kStep nibbles, the low one of a byte first.
  static KT_INLINE Codes look_up(const std::byte* nibbles, const int8_t* table) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m256i spread = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values),
                               _mm256_and_si256(spread, _mm256_set1_epi8(15)));
  }
  // The same of twice as many, the halves by tables of their own.
  static KT_INLINE __m512i look_up(const std::byte* nibbles, const int8_t* low, const int8_t* high) {
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles)));
    constexpr int kOrAnd = 0xa8;  // (a | b) & c
    const __m512i spread =
        _mm512_ternarylogic_epi32(bytes, _mm512_slli_epi16(bytes, 4), _mm512_set1_epi8(15), kOrAnd);
    const __m512i first = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(low)));
    const __m512i tables =
        _mm512_mask_broadcast_i32x4(first, 0xff00, _mm_load_si128(reinterpret_cast<const __m128i*>(high)));
    return _mm512_shuffle_epi8(tables, spread);
  }
  // Sixteen bf16 numbers to be looked up by nibbles.
#if KT_HAS_AVX512_BF16
  // The target has VBMI, whose look-up of bytes takes half of the time of one of words: a number's bytes are
  // 16 apart, all of it twice, as the fifth bit of an index tells the bytes and the sixth is whatever it is.
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
  // Scaled numbers of small formats come from tables too, rather than from codes and scales.
  static constexpr bool kLooksUpScaled = true;
  // Half of the numbers by one table, half by another.
  static KT_INLINE Segment look_up_two(const std::byte* nibbles, const Numbers& low, const Numbers& high) {
    const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(low.bytes));
    const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(high.bytes));
    const __m512i tables = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    const __m512i upper_half = _mm512_maskz_set1_epi8(0xffffffff00000000u, 32);
    return look_up_bytes(nibbles, tables, _mm512_or_si512(_mm512_set1_epi16(16 << 8), upper_half));
  }
  // Numbers of float32 by nibbles, rounded: each byte's are turned to where they index words of a table.
  static KT_INLINE Segment look_up_floats(const std::byte* nibbles, __m512 numbers) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m512i four = _mm512_permutexvar_epi8(four_of_each(), bytes);
    const __m512i turned = _mm512_shldv_epi16(four, four, _mm512_set1_epi32(13 << 16 | 1));
    return as_segment(_mm512_permutexvar_epi8(word_index(turned), words_of(numbers)));
  }
  // Of words whose bits 1 to 4 are a nibble in either byte, the indices of a table's bytes.
  static KT_INLINE __m512i word_index(__m512i turned) {
    constexpr int kAndOr = 0xea;  // (a & b) | c
    return _mm512_ternarylogic_epi32(turned, _mm512_set1_epi8(30), _mm512_set1_epi16(1 << 8), kAndOr);
  }
  // Sixteen numbers rounded to bf16, as a table.
  static KT_INLINE __m512i words_of(__m512 numbers) {
    return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(numbers));
  }
#else
  static constexpr bool kLooksUpScaled = false;
  struct Numbers {
    alignas(32) uint16_t words[16];
    constexpr void set(int nibble, uint16_t bits) { words[nibble] = bits; }
  };
  static KT_INLINE Segment look_up_segment(const std::byte* nibbles, const int8_t*, const Numbers& numbers) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m512i spread = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));  // a nibble a word
    const __m512i index = _mm512_and_si512(spread, _mm512_set1_epi16(15));
    const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers.words));
    return as_segment(_mm512_permutexvar_epi16(index, _mm512_castsi256_si512(values)));
  }
#endif
#if KT_HAS_AVX512_BF16
  // Denormals become zeros, as they do in the products.
  static KT_INLINE Segment to_segment(Codes codes) {
    return _mm512_cvtne2ps_pbh(to_floats(_mm256_extracti128_si256(codes, 1)),
                               to_floats(_mm256_castsi256_si128(codes)));
  }
  static KT_INLINE Segment to_segment(Codes codes, float scale) {
    const __m512 s = _mm512_set1_ps(scale);
    return _mm512_cvtne2ps_pbh(_mm512_mul_ps(to_floats(_mm256_extracti128_si256(codes, 1)), s),
                               _mm512_mul_ps(to_floats(_mm256_castsi256_si128(codes)), s));
  }
#else
  // Exact: a code has no more digits than a bf16.
  static KT_INLINE Segment to_segment(Codes codes) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), odd = _mm256_srai_epi16(codes, 8);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(even)), _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(odd))};
  }
  static KT_INLINE Segment to_segment(Codes codes, float scale) {
    const Segment x = to_segment(codes);
    const __m512 s = _mm512_set1_ps(scale);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_and_si512(rounded(_mm512_mul_ps(x.even, s)), high)),
            _mm512_castsi512_ps(_mm512_and_si512(rounded(_mm512_mul_ps(x.odd, s)), high))};
  }
#endif

  // bf(code scale), a scale for either half.
  static KT_INLINE Segment to_segment(Codes codes, float low, float high) {
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return join_bf16(_mm512_mul_ps(first, _mm512_set1_ps(low)), _mm512_mul_ps(second, _mm512_set1_ps(high)));
  }
  // bf(x scale) of a segment's numbers.
  static KT_INLINE Segment times(const Segment& x, float scale) {
    const __m512 s = _mm512_set1_ps(scale);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#if KT_HAS_AVX512_BF16
    const __m512i pairs = (__m512i)x;
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
    const __m512i low = _mm512_srli_epi32(rounded(_mm512_mul_ps(even, s)), 16);
    return as_segment(_mm512_or_si512(low, _mm512_and_si512(rounded(_mm512_mul_ps(odd, s)), high)));
#else
    return {_mm512_castsi512_ps(_mm512_and_si512(rounded(_mm512_mul_ps(x.even, s)), high)),
            _mm512_castsi512_ps(_mm512_and_si512(rounded(_mm512_mul_ps(x.odd, s)), high))};
#endif
  }
  // bf(x scale) of kStep numbers of E4M3. They go by half precision, whose numbers of the same bits are 2^-8
  // as large; its conversion knows no flushing of denormals.
  static KT_INLINE Segment e4m3_segment(const std::byte* p, float scale) {
    const __m512i bits = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi16(127));
    const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(127));
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    const __m512i half = _mm512_ternarylogic_epi32(_mm512_slli_epi16(size, 7), _mm512_slli_epi16(bits, 8),
                                                   _mm512_set1_epi16(-32768), kOrAnd);
    const __m512i number = _mm512_mask_mov_epi16(half, is_nan, _mm512_set1_epi16(0x7e00));
    const __m512 s = _mm512_set1_ps(scale), larger = _mm512_set1_ps(256);
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(number));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(number, 1));
    return join_bf16(_mm512_mul_ps(_mm512_mul_ps(low, larger), s),
                     _mm512_mul_ps(_mm512_mul_ps(high, larger), s));
  }

#if KT_HAS_AVX512_BF16
  // bf(x scale) for every number x of E4M3 that has no sign, its two bytes in tables of their own.
  struct E4m3Table {
    __m512i low[2], high[2];
    KT_INLINE explicit E4m3Table(float scale) {
      const __m512 s = _mm512_set1_ps(scale);
      __m512i words[4];
      KT_UNROLL for (int i = 0; i < 4; ++i) {
        const float* numbers = kE4m3.data() + 32 * i;
        words[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_loadu_ps(numbers + 16), s),
                                                _mm512_mul_ps(_mm512_loadu_ps(numbers), s));
      }
      KT_UNROLL for (int i = 0; i < 2; ++i) {
        const __m256i first = _mm512_cvtepi16_epi8(words[2 * i]),
                      second = _mm512_cvtepi16_epi8(words[2 * i + 1]);
        low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        const __m256i upper = _mm512_cvtepi16_epi8(_mm512_srli_epi16(words[2 * i], 8));
        high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(upper),
                                     _mm512_cvtepi16_epi8(_mm512_srli_epi16(words[2 * i + 1], 8)), 1);
      }
    }
    // A step of two rows.
    KT_INLINE void look_up(const std::byte* row0, const std::byte* row1, __m512i& out0, __m512i& out1) const {
      const __m512i first =
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)));
      const __m512i rows =
          _mm512_inserti64x4(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)), 1);
      // Eight bytes of one row beside eight of the other, which are unpacked to words in halves of lanes.
      const __m512i codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), rows);
      const __m512i lows = _mm512_permutex2var_epi8(low[0], codes, low[1]);
      constexpr int kXorAnd = 0x78;  // a ^ (b & c)
      const __m512i highs = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], codes, high[1]),
                                                      codes, _mm512_set1_epi8(-128), kXorAnd);
      out0 = _mm512_unpacklo_epi8(lows, highs), out1 = _mm512_unpackhi_epi8(lows, highs);
    }
    KT_INLINE void store(const std::byte* row0, const std::byte* row1, std::byte* to0, std::byte* to1) const {
      __m512i words0, words1;
      look_up(row0, row1, words0, words1);
      _mm512_storeu_si512(to0, words0);
      _mm512_storeu_si512(to1, words1);
    }
    // Each row times a power of two that leaves all its numbers normal.
    KT_INLINE void store(const std::byte* row0, const std::byte* row1, int power0, int power1, std::byte* to0,
                         std::byte* to1) const {
      __m512i words0, words1;
      look_up(row0, row1, words0, words1);
      _mm512_storeu_si512(to0, times_power(words0, power0));
      _mm512_storeu_si512(to1, times_power(words1, power1));
    }
    // NaN stays as it is, and so does zero.
    static KT_INLINE __m512i times_power(__m512i words, int power) {
      const __m512i size = _mm512_and_si512(words, _mm512_set1_epi16(0x7fff));
      const __mmask32 is_number =
          _mm512_cmplt_epu16_mask(_mm512_sub_epi16(size, _mm512_set1_epi16(1)), _mm512_set1_epi16(0x7f80));
      return _mm512_mask_add_epi16(words, is_number, words,
                                   _mm512_set1_epi16(static_cast<short>(power << 7)));
    }
  };
#endif

  // ---- integer products ----
  // Weights enter as unsigned bytes, 128 too large: kWeightOffset times the sum of the other factor is too
  // much.
  static constexpr int32_t kWeightOffset = 128;
  using Bytes = __m512i;
  using IntAcc = __m512i;
  static KT_INLINE IntAcc zero_int() { return _mm512_setzero_si512(); }
  static KT_INLINE Bytes load_bytes(const std::byte* p) { return _mm512_loadu_si512(p); }
  static KT_INLINE Bytes load_bytes_partial(const std::byte* p, size_t count) {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << count) - 1, p);
  }
  static KT_INLINE void store_bytes(std::byte* p, Bytes x) { _mm512_storeu_si512(p, x); }
  static KT_INLINE Bytes join(Codes low, Codes high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static KT_INLINE Bytes as_weights(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  static KT_INLINE void dot_bytes(IntAcc& acc, Bytes w, Bytes x) { acc = _mm512_dpbusd_epi32(acc, w, x); }
  static KT_INLINE void reduce_int(const IntAcc (&acc)[1], int32_t* out) {
    out[0] = _mm512_reduce_add_epi32(acc[0]);
  }
  static KT_INLINE void reduce_int(const IntAcc (&acc)[8], int32_t* out) {
    const __m512i abcd =
        fold_int<0x88, 0xdd>(fold_int<0x44, 0xee>(acc[0], acc[1]), fold_int<0x44, 0xee>(acc[2], acc[3]));
    const __m512i efgh =
        fold_int<0x88, 0xdd>(fold_int<0x44, 0xee>(acc[4], acc[5]), fold_int<0x44, 0xee>(acc[6], acc[7]));
    const __m512i pairs =
        _mm512_add_epi32(_mm512_unpacklo_epi64(abcd, efgh), _mm512_unpackhi_epi64(abcd, efgh));
    const __m512i sums = _mm512_add_epi32(pairs, _mm512_srli_epi64(pairs, 32));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm512_castsi512_si256(_mm512_permutexvar_epi32(reduced_order(), sums)));
  }

  // ---- products of pairs ----
  static constexpr int kPairGroups = 4;
  using Pairs = Segment;
  static KT_INLINE Pairs load_pairs(const std::byte* p) { return load(p); }
#if KT_HAS_AVX512_BF16
  static constexpr int kPairRows = 6;  // 24 accumulators + 4 rhs + 1 lhs of 32 registers
  static KT_INLINE Pairs broadcast_pair(uint32_t pair) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
  }
#else
  static constexpr int kPairRows = 4;  // 16 accumulators + 8 rhs and 2 lhs halves
  static KT_INLINE Pairs broadcast_pair(uint32_t pair) {
    return split(_mm512_set1_epi32(static_cast<int>(pair)));
  }
#endif
  static KT_INLINE void dot_pairs(Acc& acc, const Pairs& lhs, const Pairs& rhs) { dot(acc, lhs, rhs); }

  // ---- limits ----
  static constexpr int kPeakChains = 24;
  using Sum = __m512i;
  static KT_INLINE void add_to(Sum& sum, const std::byte* p) {
    sum = _mm512_xor_si512(sum, _mm512_loadu_si512(p));
  }

  // ---- elementwise fp32 ----
  static constexpr size_t kWidth = 16;
  using Float = __m512;
  using Mask = __mmask16;
  static KT_INLINE Float set(float x) { return _mm512_set1_ps(x); }
  static KT_INLINE Float load_f(const float* p) { return _mm512_loadu_ps(p); }
  static KT_INLINE Float load_bf16(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // The elements of even and of odd places of 2 kWidth.
  static KT_INLINE Float load_even(const std::byte* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static KT_INLINE Float load_odd(const std::byte* p) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high));
  }
  static KT_INLINE void store_f(float* p, Float x) { _mm512_storeu_ps(p, x); }
  // int32 in the memory of floats.
  static KT_INLINE Float load_ints(const float* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static KT_INLINE void store_bf16(bf16* p, Float x) {
    const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  }
  static KT_INLINE void store_bf16_pairs(bf16* p, Float even, Float odd) {
    const __m512i high = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(rounded(even), 16), high));
  }
  // All lanes, added by the tree of reduce.
  static KT_INLINE float sum(Float x) {
    const Acc lanes[1] = {x};
    float total;
    reduce(lanes, &total);
    return total;
  }
  static KT_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static KT_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static KT_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static KT_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static constexpr bool kFusesFma = true;  // fma rounds once
  static KT_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static KT_INLINE Codes codes_of(__m256i bytes, size_t) { return bytes; }
  static KT_INLINE __m256i shift_right(__m256i x, int bits) {
    return _mm256_srlv_epi16(x, _mm256_set1_epi16(static_cast<short>(bits)));
  }
  // A float16 in memory, in all lanes.
  static KT_INLINE Float half(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(formats::half_bits_at(p))));
  }
  static KT_INLINE Float load_half_at(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Numbers of int8 from i on, eight in a word.
  static KT_INLINE Float int8_of(const uint64_t* words, size_t) {
    return to_floats(_mm_set_epi64x(static_cast<int64_t>(words[1]), static_cast<int64_t>(words[0])));
  }
  // Codes in their order, and as many numbers rounded to bf16.
  static KT_INLINE void to_floats(Codes codes, Float (&x)[2]) {
    x[0] = to_floats(_mm256_castsi256_si128(codes)), x[1] = to_floats(_mm256_extracti128_si256(codes, 1));
  }
  static KT_INLINE void store_rounded(std::byte* p, const Float (&x)[2]) {
#if KT_HAS_AVX512_BF16
    store(p, join_bf16(x[0], x[1]));
#else
    store_bf16(reinterpret_cast<bf16*>(p), x[0]);
    store_bf16(reinterpret_cast<bf16*>(p) + kWidth, x[1]);
#endif
  }
  // min and max give their second operand when either is NaN.
  static KT_INLINE Float clamp_above(Float x, Float limit) { return _mm512_min_ps(limit, x); }
  static KT_INLINE Float clamp_below(Float x, Float limit) { return _mm512_max_ps(limit, x); }
  static KT_INLINE Float abs(Float x) { return _mm512_abs_ps(x); }
  static KT_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static KT_INLINE Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }
  static KT_INLINE Float round(Float x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x 2^n for a whole n, rounded once.
  static KT_INLINE Float scale(Float x, Float n) { return _mm512_scalef_ps(x, n); }

  // ---- quantising ----
  using Bits = __m512i;
  static KT_INLINE Float load_f_at(const std::byte* p) { return _mm512_loadu_ps(p); }
  static KT_INLINE Float load_bf16_at(const std::byte* p) {
    return load_bf16(reinterpret_cast<const bf16*>(p));
  }
  static KT_INLINE Bits zero_bits() { return _mm512_setzero_si512(); }
  // Sizes compared as bits, so that infinities and NaN are larger than any number.
  static KT_INLINE Bits larger_size(Bits sizes, Float x) {
    return _mm512_max_epi32(sizes, _mm512_castps_si512(abs(x)));
  }
  static KT_INLINE float largest_size(Bits sizes) {
    return std::bit_cast<float>(_mm512_reduce_max_epi32(sizes));
  }
  // The bits of whole numbers as integers, joined.
  static KT_INLINE Bits join_whole(Bits joined, Float x) {
    return _mm512_or_si512(joined, _mm512_cvtps_epi32(x));
  }
  static KT_INLINE uint32_t join(Bits joined) {
    return static_cast<uint32_t>(_mm512_reduce_or_epi32(joined));
  }
  // Of numbers.
  static KT_INLINE float largest(Float x) { return _mm512_reduce_max_ps(x); }
  // A number rounded to bf16.
  static KT_INLINE Float nearest_bf16(Float x) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded_number(_mm512_castps_si512(x)), high));
  }
  // kWidth numbers of the range of int8, rounded to whole ones.
  static KT_INLINE void store_int8(int8_t* p, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }

 private:
  static KT_INLINE __m512 to_floats(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }
#if KT_HAS_AVX512_BF16
  // Bytes of a table by nibbles; `select` has the higher bits of the indices.
  static KT_INLINE Segment look_up_bytes(const std::byte* nibbles, __m512i table, __m512i select) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m512i four = _mm512_permutexvar_epi8(four_of_each(), bytes);
    const __m512i shifted = _mm512_srlv_epi16(four, _mm512_set1_epi32(4 << 16));
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const __m512i index = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(15), select, kAndOr);
    return as_segment(_mm512_permutexvar_epi8(index, table));
  }
  static KT_INLINE Segment join_bf16(__m512 low, __m512 high) { return _mm512_cvtne2ps_pbh(high, low); }
#else
  static KT_INLINE Segment join_bf16(__m512 low, __m512 high) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512i even = rounded(_mm512_permutex2var_ps(low, evens, high));
    const __m512i odd = rounded(_mm512_permutex2var_ps(low, odds, high));
    return {_mm512_castsi512_ps(_mm512_and_si512(even, mask)),
            _mm512_castsi512_ps(_mm512_and_si512(odd, mask))};
  }
#endif
  // Bytes 0 to 15, each four times.
  static KT_INLINE __m512i four_of_each() {
    return _mm512_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606,
                             0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c,
                             0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
  }
  // Where reduce finds its eight sums.
  static KT_INLINE __m512i reduced_order() {
    return _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  }
  static KT_INLINE __m512d as_pd(__m512 x) { return _mm512_castps_pd(x); }
  static KT_INLINE __m512 as_ps(__m512d x) { return _mm512_castpd_ps(x); }

  // Halves of a and of b added: [a + a', b + b'].
  static KT_INLINE __m512 fold8(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  // Quarters of the sums in ab and cd added: [a b c d].
  static KT_INLINE __m512 fold4(__m512 ab, __m512 cd) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  template <int kFirst, int kSecond>
  static KT_INLINE __m512i fold_int(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, kFirst), _mm512_shuffle_i32x4(a, b, kSecond));
  }
  // The bits of x, rounded to nearest even at bit 16; NaN keeps its quiet bit.
  static KT_INLINE __m512i rounded(Float x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded_number(bits), nan, bits, _mm512_set1_epi32(0x400000));
  }
  static KT_INLINE __m512i rounded_number(__m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
};
