// Vectors of 256 bits with FMA. Included inside a target's namespace. bf16 pairs are split into two fp32
// vectors: the even elements shifted up, the odd ones masked.

struct VecAvx2 {
  // ---- rows-dot-rows products ----
  static constexpr size_t kStep = 16;
  static constexpr int kRowTile = 4;
  static constexpr int kTokenTile = 2;  // 8 accumulators + 4 activation and 2 weight halves of 16 registers
  using Acc = __m256;
  struct Segment {
    __m256 even, odd;
  };
  static KT_INLINE Acc zero_acc() { return _mm256_setzero_ps(); }
  static KT_INLINE Segment load(const std::byte* p) {
    return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    alignas(32) std::byte full[32] = {};
    std::memcpy(full, p, count * 2);
    return load(full);
  }
  static KT_INLINE void store(std::byte* p, const Segment& s) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(s.even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, _mm256_castps_si256(s.odd)));
  }
  static KT_INLINE void dot(Acc& acc, const Segment& w, const Segment& x) {
    acc = _mm256_fmadd_ps(w.odd, x.odd, acc);
    acc = _mm256_fmadd_ps(w.even, x.even, acc);
  }

  // Lane i with i + 4, then i + 2, i + 1: the same tree for one sum as for four.
  static KT_INLINE void reduce(const Acc (&acc)[1], float* out) {
    const __m128 b = fold4(acc[0]);
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    out[0] = _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static KT_INLINE void reduce(const Acc (&acc)[4], float* out) {
    const __m128 a = fold4(acc[0]), b = fold4(acc[1]), c = fold4(acc[2]), d = fold4(acc[3]);
    const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));  // a02 a13 b02 b13
    const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    const __m128 even = _mm_shuffle_ps(ab, cd, 0x88), odd = _mm_shuffle_ps(ab, cd, 0xdd);
    _mm_storeu_ps(out, _mm_add_ps(even, odd));
  }

  // ---- int8 codes ----
  using Codes = __m128i;
  static KT_INLINE Codes no_codes() { return _mm_setzero_si128(); }
  static KT_INLINE Codes load_codes(const std::byte* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static KT_INLINE Codes load_codes_partial(const std::byte* p, size_t count) {
    alignas(16) std::byte full[16] = {};
    std::memcpy(full, p, count);
    return load_codes(full);
  }
  // table[nibble] for kStep nibbles; the low nibble of a byte comes first.
  static KT_INLINE Codes look_up(const std::byte* nibbles, const int8_t* table) {
    const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(nibbles)));
    const __m128i spread = _mm_or_si128(bytes, _mm_slli_epi16(bytes, 4));
    return _mm_shuffle_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(table)),
                            _mm_and_si128(spread, _mm_set1_epi8(15)));
  }
  // The same for 2 kStep nibbles, with one table for each half of them.
  static KT_INLINE __m256i look_up(const std::byte* nibbles, const int8_t* low, const int8_t* high) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m256i spread = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
    const __m256i tables = _mm256_set_m128i(_mm_load_si128(reinterpret_cast<const __m128i*>(high)),
                                            _mm_load_si128(reinterpret_cast<const __m128i*>(low)));
    return _mm256_shuffle_epi8(tables, _mm256_and_si256(spread, _mm256_set1_epi8(15)));
  }

  // ---- lookup tables of scaled numbers ----
  static constexpr bool kLooksUpScaled = true;
  // 16 numbers in bf16: their lower and their upper bytes.
  struct Numbers {
    alignas(16) uint8_t low[16], high[16];
    constexpr void set(int nibble, uint16_t bits) {
      low[nibble] = static_cast<uint8_t>(bits), high[nibble] = static_cast<uint8_t>(bits >> 8);
    }
  };
  // The same in both lanes.
  struct Table {
    __m256i low, high;
  };
  static KT_INLINE Table table_of(const Numbers& numbers) {
    const auto* low = reinterpret_cast<const __m128i*>(numbers.low);
    const auto* high = reinterpret_cast<const __m128i*>(numbers.high);
    return {_mm256_broadcastsi128_si256(_mm_load_si128(low)),
            _mm256_broadcastsi128_si256(_mm_load_si128(high))};
  }
  // Of numbers that are rounded as scaled ones (store_scaled).
  static KT_INLINE Table table_of(const __m256 (&numbers)[2]) {
    const __m256i first = _mm256_srli_epi32(rounded_number(_mm256_castps_si256(numbers[0])), 16);
    const __m256i second = _mm256_srli_epi32(rounded_number(_mm256_castps_si256(numbers[1])), 16);
    const __m256i words = _mm256_packus_epi32(first, second);  // numbers 0-3, 8-11 | 4-7, 12-15
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(words, 8);
    const __m256i bytes =
        _mm256_packus_epi16(low, high);  // dwords: low 0, 2, high 0, 2 | low 1, 3, high 1, 3
    return {_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5)),
            _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7))};
  }
  static KT_INLINE Segment look_up_segment(const std::byte* nibbles, const int8_t*, const Numbers& numbers) {
    return look_up_in(nibbles, table_of(numbers));
  }
  static KT_INLINE Segment look_up_floats(const std::byte* nibbles, const __m256 (&numbers)[2]) {
    return look_up_in(nibbles, table_of(numbers));
  }
  static KT_INLINE Segment look_up_in(const std::byte* nibbles, const Table& table) {
    // Dwords: low and high nibbles of bytes 0 to 3 | of bytes 4 to 7.
    const __m256i bytes = _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(nibbles)));
    const __m256i order = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i index = nibbles_of_dwords(_mm256_permutevar8x32_epi32(bytes, order),
                                            _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    const __m256i words =
        _mm256_unpacklo_epi8(_mm256_shuffle_epi8(table.low, index), _mm256_shuffle_epi8(table.high, index));
    return {low_words_as_floats(words), high_words_as_floats(words)};
  }
  // Of 2 kStep nibbles, with one table.
  static KT_INLINE void look_up_two(const std::byte* nibbles, const Table& table, Segment (&to)[2]) {
    // Dwords: low nibbles of bytes 0 to 3, 8 to 11, high ones of the same | of bytes 4 to 7, 12 to 15.
    const __m256i bytes = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m256i order = _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3);
    const __m256i index = nibbles_of_dwords(_mm256_permutevar8x32_epi32(bytes, order),
                                            _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4));
    const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
    const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
    to[0] = {low_words_as_floats(even), low_words_as_floats(odd)};
    to[1] = {high_words_as_floats(even), high_words_as_floats(odd)};
  }

  // Exact: a code has no more digits than a bf16.
  static KT_INLINE Segment to_segment(Codes codes) {
    const __m128i even = _mm_srai_epi16(_mm_slli_epi16(codes, 8), 8), odd = _mm_srai_epi16(codes, 8);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(even)), _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(odd))};
  }
  static KT_INLINE Segment to_segment(Codes codes, float scale) { return times(to_segment(codes), scale); }
  static KT_INLINE Segment times(const Segment& x, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    return {rounded_bf16(_mm256_mul_ps(x.even, s)), rounded_bf16(_mm256_mul_ps(x.odd, s))};
  }

  // ---- integer products ----
  static constexpr int32_t kWeightOffset = 0;
  using Bytes = __m256i;
  using IntAcc = __m256i;
  static KT_INLINE IntAcc zero_int() { return _mm256_setzero_si256(); }
  static KT_INLINE Bytes load_bytes(const std::byte* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static KT_INLINE Bytes load_bytes_partial(const std::byte* p, size_t count) {
    alignas(32) std::byte full[32] = {};
    std::memcpy(full, p, count);
    return load_bytes(full);
  }
  static KT_INLINE void store_bytes(std::byte* p, Bytes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  static KT_INLINE Bytes join(Codes low, Codes high) { return _mm256_set_m128i(high, low); }
  static KT_INLINE Bytes as_weights(Bytes x) { return x; }
  // Codes are at most 127 in size, so pairs of products do not saturate.
  static KT_INLINE void dot_bytes(IntAcc& acc, Bytes w, Bytes x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <int kRows>
  static KT_INLINE void reduce_int(const IntAcc (&acc)[kRows], int32_t* out) {
    KT_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(acc[r]), _mm256_extracti128_si256(acc[r], 1));
      const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
      out[r] = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
  }

  // ---- products of pairs ----
  static constexpr int kPairRows = 4, kPairGroups = 1;  // 8 accumulators + 4 rhs and 2 lhs halves
  using Pairs = Segment;
  static KT_INLINE Pairs load_pairs(const std::byte* p) { return load(p); }
  static KT_INLINE Pairs broadcast_pair(uint32_t pair) {
    return split(_mm256_set1_epi32(static_cast<int>(pair)));
  }
  static KT_INLINE void dot_pairs(Acc& acc, const Pairs& lhs, const Pairs& rhs) { dot(acc, lhs, rhs); }

  // ---- limits ----
  static constexpr int kPeakChains = 10;
  struct Sum {
    __m256i low, high;
  };
  static KT_INLINE void add_to(Sum& sum, const std::byte* p) {
    const __m256i* v = reinterpret_cast<const __m256i*>(p);
    sum.low = _mm256_xor_si256(sum.low, _mm256_loadu_si256(v));
    sum.high = _mm256_xor_si256(sum.high, _mm256_loadu_si256(v + 1));
  }

  // ---- elementwise fp32 ----
  static constexpr size_t kWidth = 8;
  using Float = __m256;
  using Mask = __m256;
  static KT_INLINE Float set(float x) { return _mm256_set1_ps(x); }
  static KT_INLINE Float load_f(const float* p) { return _mm256_loadu_ps(p); }
  static KT_INLINE Float load_bf16(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static KT_INLINE void store_f(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static KT_INLINE void store_bf16(bf16* p, Float x) {
    const __m256i high = _mm256_srli_epi32(rounded(x), 16);
    const __m128i bits = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
  }
  // The sum of all lanes, by the tree of reduce.
  static KT_INLINE float sum(Float x) {
    const Acc lanes[1] = {x};
    float total;
    reduce(lanes, &total);
    return total;
  }
  static KT_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static KT_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static KT_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static KT_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static constexpr bool kFusesFma = true;  // fma rounds once
  static KT_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // The float16 at p, broadcast to all lanes.
  static KT_INLINE Float half(const std::byte* p) {
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(half_bits_at(p))));
  }
  static KT_INLINE Float load_half_at(const std::byte* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // int8 values from the i-th on, eight per word.
  static KT_INLINE Float int8_of(const uint64_t* words, size_t i) {
    const __m128i numbers = _mm_cvtsi64_si128(static_cast<int64_t>(words[i / 8]));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(numbers));
  }
  static KT_INLINE void to_floats(Codes codes, Float (&x)[2]) {
    x[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    x[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)));
  }
  static KT_INLINE void store_rounded(std::byte* p, const Float (&x)[2]) {
    store_words(p, rounded(x[0]), rounded(x[1]));
  }
  static KT_INLINE Float without_payload(Float x) {
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_blendv_ps(x, _mm256_set1_ps(std::numeric_limits<float>::quiet_NaN()), nan);
  }
  static KT_INLINE void store_scaled(std::byte* p, const Float (&x)[2]) {
    store_words(p, rounded_number(_mm256_castps_si256(x[0])), rounded_number(_mm256_castps_si256(x[1])));
  }
  // min and max return their second operand when either is NaN.
  static KT_INLINE Float clamp_above(Float x, Float limit) { return _mm256_min_ps(limit, x); }
  static KT_INLINE Float clamp_below(Float x, Float limit) { return _mm256_max_ps(limit, x); }
  static KT_INLINE Float abs(Float x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static KT_INLINE Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static KT_INLINE Float select(Mask m, Float yes, Float no) { return _mm256_blendv_ps(no, yes, m); }
  static KT_INLINE Float round(Float x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x 2^n for an integral n, rounded once. In two factors, as n may exceed the exponents of normal numbers.
  static KT_INLINE Float scale(Float x, Float n) {
    const Float half = round(mul(n, set(0.5f)));
    return mul(mul(x, pow2(half)), pow2(sub(n, half)));
  }

  // ---- quantizing ----
  using Bits = __m256i;
  static KT_INLINE Float load_f_at(const std::byte* p) { return load_f(reinterpret_cast<const float*>(p)); }
  static KT_INLINE Float load_bf16_at(const std::byte* p) {
    return load_bf16(reinterpret_cast<const bf16*>(p));
  }
  static KT_INLINE Bits zero_bits() { return _mm256_setzero_si256(); }
  // Magnitudes are compared as bits, so infinities and NaN are larger than any finite number.
  static KT_INLINE Bits larger_size(Bits sizes, Float x) {
    return _mm256_max_epi32(sizes, _mm256_castps_si256(abs(x)));
  }
  static KT_INLINE float largest_size(Bits sizes) {
    const __m128i a = _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    const __m128i b = _mm_max_epi32(a, _mm_unpackhi_epi64(a, a));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(b, _mm_srli_epi64(b, 32))));
  }
  // Bits or'ed with those of x as integers.
  static KT_INLINE Bits join_whole(Bits joined, Float x) {
    return _mm256_or_si256(joined, _mm256_cvtps_epi32(x));
  }
  static KT_INLINE uint32_t join(Bits joined) {
    const __m128i a = _mm_or_si128(_mm256_castsi256_si128(joined), _mm256_extracti128_si256(joined, 1));
    const __m128i b = _mm_or_si128(a, _mm_unpackhi_epi64(a, a));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_or_si128(b, _mm_srli_epi64(b, 32))));
  }
  static KT_INLINE float largest(Float x) {
    const __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }
  // x rounded to bf16; x is not NaN.
  static KT_INLINE Float nearest_bf16(Float x) {
    return _mm256_castsi256_ps(high_words(rounded_number(_mm256_castps_si256(x))));
  }
  // Rounded to integers; x lies in the range of int8.
  static KT_INLINE void store_int8(int8_t* p, Float x) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }

  // ---- for formats with code for this instruction set ----
  // x rounded to bf16; a NaN becomes a quiet NaN.
  static KT_INLINE Float rounded_bf16(Float x) { return _mm256_castsi256_ps(high_words(rounded(x))); }

 private:
  // The nibbles that begin at the bit `shift` of each byte of a dword.
  static KT_INLINE __m256i nibbles_of_dwords(__m256i dwords, __m256i shift) {
    return _mm256_and_si256(_mm256_srlv_epi32(dwords, shift), _mm256_set1_epi8(15));
  }
  // Words as the upper halves of floats: the first or the last four of each lane.
  static KT_INLINE __m256 low_words_as_floats(__m256i words) {
    return _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), words));
  }
  static KT_INLINE __m256 high_words_as_floats(__m256i words) {
    return _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), words));
  }
  // The upper words of two vectors.
  static KT_INLINE void store_words(std::byte* p, __m256i first, __m256i second) {
    const __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
  }
  static KT_INLINE Segment split(__m256i pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(high_words(pairs))};
  }
  // The sums of the halves.
  static KT_INLINE __m128 fold4(__m256 x) {
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  }
  // 2^n for an integral n in [-126, 127].
  static KT_INLINE Float pow2(Float n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  // The upper 16 bits of each lane; the lower ones become zeros.
  static KT_INLINE __m256i high_words(__m256i bits) {
    return _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  }
  // The bits of x, rounded to nearest even at bit 16; a NaN becomes a quiet NaN.
  static KT_INLINE __m256i rounded(Float x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(rounded_number(bits), quiet, nan);
  }
  static KT_INLINE __m256i rounded_number(__m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }
};
