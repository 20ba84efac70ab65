// 32 packed nibbles that are to be looked up, with VBMI. Included inside a target's namespace, after its
// bytes.
#include "kernels/policy/nibbles.h"

struct Nibbles32 {
  __m512i twice;  // each byte in both bytes of a word
  __m512i left;   // how far a word is rotated left to move its nibble to bits 1 to 4 of both bytes
};
struct PackedNibbles {
  // The low nibbles of 16 bytes, then the high ones.
  static KT_INLINE Nibbles32 in_16(const std::byte* p) {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m128i low = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m256i both = _mm256_setr_m128i(low, _mm_add_epi8(low, _mm_set1_epi8(8)));
    const __m512i order = _mm512_inserti64x4(_mm512_castsi256_si512(both), both, 1);
    const __m512i left = _mm512_mask_set1_epi16(_mm512_set1_epi16(1), 0xffff0000u, 13);
    return {_mm512_shuffle_epi8(four, order), left};
  }
  // The low or the high nibbles of 32 bytes.
  static KT_INLINE Nibbles32 in_32(const std::byte* p, bool high) {
    const __m512i order = _mm512_setr_epi32(
        0x01010000, 0x03030202, 0x05050404, 0x07070606, 0x09090808, 0x0b0b0a0a, 0x0d0d0c0c, 0x0f0f0e0e,
        0x11111010, 0x13131212, 0x15151414, 0x17171616, 0x19191818, 0x1b1b1a1a, 0x1d1d1c1c, 0x1f1f1e1e);
    return {_mm512_permutexvar_epi8(order, _mm512_castsi256_si512(load_32(p))),
            _mm512_set1_epi16(high ? 13 : 1)};
  }
};

// Stores bf(numbers[nibble]) of each nibble at the place that `next` gives.
template <class Next>
KT_INLINE void store_looked_up(Next& next, const Nibbles32& x, const Vec::Float (&numbers)[1]) {
  Vec::store(next.place(), Vec::look_up_rotated(_mm512_shldv_epi16(x.twice, x.twice, x.left), numbers[0]));
}
