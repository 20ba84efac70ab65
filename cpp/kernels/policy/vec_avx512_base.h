// 512-bit vectors: everything that does not depend on how a register holds a segment of bf16. vec_avx512.h
// and vec_avx512_bf16.h derive from this and add the rest. Included inside a target's namespace.

struct VecAvx512Base {
  // ---- rows-dot-rows products ----
  static constexpr size_t kStep = 32;
  static constexpr int kRowTile = 8;
  using Acc = __m512;
  static KT_INLINE Acc zero_acc() { return _mm512_setzero_ps(); }

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
  // table[nibble] for kStep nibbles; the low nibble of a byte comes first.
  static KT_INLINE Codes look_up(const std::byte* nibbles, const int8_t* table) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    const __m256i spread = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values),
                               _mm256_and_si256(spread, _mm256_set1_epi8(15)));
  }
  // The same for 2 kStep nibbles, with one table for each half of them.
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

  // ---- integer products ----
  // The instruction takes weights as unsigned bytes, so they are offset by 128, and a dot product comes out
  // too large by kWeightOffset times the sum of the activations.
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
  static KT_INLINE Float without_payload(Float x) { return x; }
  static KT_INLINE Float load_f(const float* p) { return _mm512_loadu_ps(p); }
  static KT_INLINE Float load_bf16(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // The even and the odd elements of 2 kWidth bf16.
  static KT_INLINE Float load_even(const std::byte* p) { return even_of(_mm512_loadu_si512(p)); }
  static KT_INLINE Float load_odd(const std::byte* p) { return odd_of(_mm512_loadu_si512(p)); }
  static KT_INLINE void store_f(float* p, Float x) { _mm512_storeu_ps(p, x); }
  // int32 values stored in a float array.
  static KT_INLINE Float load_ints(const float* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static KT_INLINE void store_bf16(bf16* p, Float x) {
    const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  }
  static KT_INLINE void store_bf16_pairs(bf16* p, Float even, Float odd) {
    const __m512i high = high_words(rounded(odd));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(rounded(even), 16), high));
  }
  // The sum of all lanes, by the tree of reduce.
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
  // The float16 at p, broadcast to all lanes.
  static KT_INLINE Float half(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(half_bits_at(p))));
  }
  static KT_INLINE Float load_half_at(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // int8 values from the i-th on, eight per word.
  static KT_INLINE Float int8_of(const uint64_t* words, size_t) {
    return to_floats(_mm_set_epi64x(static_cast<int64_t>(words[1]), static_cast<int64_t>(words[0])));
  }
  static KT_INLINE void to_floats(Codes codes, Float (&x)[2]) {
    x[0] = first_half(codes), x[1] = second_half(codes);
  }
  // min and max return their second operand when either is NaN.
  static KT_INLINE Float clamp_above(Float x, Float limit) { return _mm512_min_ps(limit, x); }
  static KT_INLINE Float clamp_below(Float x, Float limit) { return _mm512_max_ps(limit, x); }
  static KT_INLINE Float abs(Float x) { return _mm512_abs_ps(x); }
  static KT_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static KT_INLINE Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }
  static KT_INLINE Float round(Float x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x 2^n for an integral n, rounded once.
  static KT_INLINE Float scale(Float x, Float n) { return _mm512_scalef_ps(x, n); }

  // ---- quantizing ----
  using Bits = __m512i;
  static KT_INLINE Float load_f_at(const std::byte* p) { return _mm512_loadu_ps(p); }
  static KT_INLINE Float load_bf16_at(const std::byte* p) {
    return load_bf16(reinterpret_cast<const bf16*>(p));
  }
  static KT_INLINE Bits zero_bits() { return _mm512_setzero_si512(); }
  // Magnitudes are compared as bits, so infinities and NaN are larger than any finite number.
  static KT_INLINE Bits larger_size(Bits sizes, Float x) {
    return _mm512_max_epi32(sizes, _mm512_castps_si512(abs(x)));
  }
  static KT_INLINE float largest_size(Bits sizes) {
    return std::bit_cast<float>(_mm512_reduce_max_epi32(sizes));
  }
  // Bits or'ed with those of x as integers.
  static KT_INLINE Bits join_whole(Bits joined, Float x) {
    return _mm512_or_si512(joined, _mm512_cvtps_epi32(x));
  }
  static KT_INLINE uint32_t join(Bits joined) {
    return static_cast<uint32_t>(_mm512_reduce_or_epi32(joined));
  }
  static KT_INLINE float largest(Float x) { return _mm512_reduce_max_ps(x); }
  // x rounded to bf16; x is not NaN.
  static KT_INLINE Float nearest_bf16(Float x) {
    return _mm512_castsi512_ps(high_words(rounded_number(_mm512_castps_si512(x))));
  }
  // Rounded to integers; x lies in the range of int8.
  static KT_INLINE void store_int8(int8_t* p, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }

 protected:
  // Codes as floats.
  static KT_INLINE Float first_half(Codes codes) { return to_floats(_mm256_castsi256_si128(codes)); }
  static KT_INLINE Float second_half(Codes codes) { return to_floats(_mm256_extracti128_si256(codes, 1)); }
  static KT_INLINE Float to_floats(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }
  // Fewer than kStep bf16, then zeros.
  static KT_INLINE __m512i load_pairs_partial(const std::byte* p, size_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
  }
  // The even and the odd elements of pairs of bf16, as floats.
  static KT_INLINE Float even_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static KT_INLINE Float odd_of(__m512i pairs) { return _mm512_castsi512_ps(high_words(pairs)); }
  // The upper 16 bits of each lane; the lower ones become zeros.
  static KT_INLINE __m512i high_words(__m512i bits) {
    return _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }
  // The bits of x, rounded to nearest even at bit 16; a NaN becomes a quiet NaN.
  static KT_INLINE __m512i rounded(Float x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded_number(bits), nan, bits, _mm512_set1_epi32(0x400000));
  }
  static KT_INLINE __m512i rounded_number(__m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }

 private:
  // The lanes that hold the eight sums of reduce.
  static KT_INLINE __m512i reduced_order() {
    return _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  }
  static KT_INLINE __m512d as_pd(__m512 x) { return _mm512_castps_pd(x); }
  static KT_INLINE __m512 as_ps(__m512d x) { return _mm512_castpd_ps(x); }

  // The sums of the halves of a and of b: [a + a', b + b'].
  static KT_INLINE __m512 fold8(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  // The sums of the quarters that belong together: [a b c d].
  static KT_INLINE __m512 fold4(__m512 ab, __m512 cd) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  template <int kFirst, int kSecond>
  static KT_INLINE __m512i fold_int(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, kFirst), _mm512_shuffle_i32x4(a, b, kSecond));
  }
};
