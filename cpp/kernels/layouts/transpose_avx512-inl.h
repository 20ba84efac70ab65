// to[stride j + i] = dword j at row[i] + at, for 16 rows of 16 dwords, in registers: dwords, then pairs, then
// quarters change places. Included inside a target's namespace.

inline void transpose_dwords(const std::byte* const* row, size_t at, uint32_t* to, size_t stride = 16) {
  __m512i a[16], b[16];
  KT_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(row[i] + at);
  KT_UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  KT_UNROLL for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + c] contains, in quarter q, column 4 q + c of rows 4 g .. 4 g + 3.
  KT_UNROLL for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44),
                  high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44),
                  high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_si512(to + stride * static_cast<size_t>(c), _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + stride * static_cast<size_t>(4 + c), _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + stride * static_cast<size_t>(8 + c), _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + stride * static_cast<size_t>(12 + c),
                        _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}
