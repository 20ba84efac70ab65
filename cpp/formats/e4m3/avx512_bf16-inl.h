// Tiles of E4M3 by lookup tables, with VBMI. Included inside a target's namespace, after avx512-inl.h: models
// E4m3TileDecoder (formats/fp8.h).

// bf(x scale) for every x of E4M3 without a sign, the low and the high bytes of the results in separate
// tables.
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
  // kStep elements of two rows.
  KT_INLINE void look_up(const std::byte* row0, const std::byte* row1, __m512i& out0, __m512i& out1) const {
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)));
    const __m512i rows =
        _mm512_inserti64x4(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)), 1);
    // Eight bytes of one row next to eight of the other: unpacking interleaves within quarters of a vector.
    const __m512i codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), rows);
    const __m512i lows = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    constexpr int kXorAnd = 0x78;  // a ^ (b & c)
    const __m512i highs = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], codes, high[1]), codes,
                                                    _mm512_set1_epi8(-128), kXorAnd);
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
  // The power is added to the exponents, except of NaN and zero.
  static KT_INLINE __m512i times_power(__m512i words, int power) {
    const __m512i size = _mm512_and_si512(words, _mm512_set1_epi16(0x7fff));
    const __mmask32 is_number =
        _mm512_cmplt_epu16_mask(_mm512_sub_epi16(size, _mm512_set1_epi16(1)), _mm512_set1_epi16(0x7f80));
    return _mm512_mask_add_epi16(words, is_number, words, _mm512_set1_epi16(static_cast<short>(power << 7)));
  }
};

struct E4m3Avx512Bf16 : E4m3Avx512 {
  static constexpr bool kDecodesTiles = true;

  static KT_INLINE void decode_tile(const WeightView& rows, size_t k, float scale, std::byte* to,
                                    ptrdiff_t line) {
    const E4m3Table table(scale);
    const std::byte* row = rows.data;
    const ptrdiff_t stride = rows.row_stride_bytes;
    for (uint32_t r = 0; r < kRows; r += 2, row += 2 * stride, to += 2 * kRowBytes) {
      prefetch(row, stride, line);
      table.store(row + k, row + stride + k, to, to + kRowBytes);
    }
  }

  // Numbers are from 2^-9 to below 2^9, so scales from 2^-117 to 2^117 leave them normal and finite.
  static KT_INLINE void decode_tile_of_groups(const WeightView& rows, size_t k, size_t group, std::byte* to,
                                              ptrdiff_t line) {
    const E4m3Table table(1.0f);
    const std::byte *row = rows.data, *scale = rows.block_scales_of(0, 1) + k / group;
    const ptrdiff_t stride = rows.row_stride_bytes, scales_stride = rows.block_scales_stride_bytes;
    for (uint32_t r = 0; r < kRows; r += 2) {
      prefetch(row, stride, line);
      const int power0 = static_cast<int>(scale[0]) - 127,
                power1 = static_cast<int>(scale[scales_stride]) - 127;
      if (power0 >= -117 && power0 <= 117 && power1 >= -117 && power1 <= 117) {
        table.store(row + k, row + stride + k, power0, power1, to, to + kRowBytes);
      } else {
        Vec::store(to, segment(row + k, e8m0_to_float(static_cast<uint8_t>(scale[0]))));
        Vec::store(to + kRowBytes,
                   segment(row + stride + k, e8m0_to_float(static_cast<uint8_t>(scale[scales_stride]))));
      }
      row += 2 * stride, scale += 2 * scales_stride, to += 2 * kRowBytes;
    }
  }

 private:
  static constexpr uint32_t kRows = 16;
  static constexpr size_t kRowBytes = Vec::kStep * sizeof(bf16);

  // A cache line of two rows.
  static KT_INLINE void prefetch(const std::byte* row, ptrdiff_t stride, ptrdiff_t line) {
    if (line >= 0) {
      __builtin_prefetch(row + line, 0, 2);
      __builtin_prefetch(row + stride + line, 0, 2);
    }
  }
};
