// 32 packed nibbles that are to be looked up, one per byte: numbers 0 to 7 and 16 to 23 in the lower lane,
// the others in the upper one, so that interleaving bytes within lanes gives words in order. Included inside
// a target's namespace, after its bytes.
#include "kernels/policy/nibbles.h"

struct Nibbles32 {
  __m256i index;
};
struct PackedNibbles {
  // The low nibbles of 16 bytes, then the high ones.
  static KT_INLINE Nibbles32 in_16(const std::byte* p) {
    const __m256i bytes = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i shifted =
        _mm256_srlv_epi64(_mm256_permute4x64_epi64(bytes, 0x50), _mm256_setr_epi64x(0, 4, 0, 4));
    return {_mm256_and_si256(shifted, _mm256_set1_epi8(15))};
  }
  // The low or the high nibbles of 32 bytes.
  static KT_INLINE Nibbles32 in_32(const std::byte* p, bool high) {
    return {bits_of(_mm256_permute4x64_epi64(load_32(p), 0xd8), high ? 4 : 0, 15)};
  }
};

// Stores bf(numbers[nibble]) of each nibble at the places that `next` gives.
template <class Next>
KT_INLINE void store_looked_up(Next& next, const Nibbles32& x, const Vec::Float (&numbers)[2]) {
  const Vec::Table table = Vec::table_of(numbers);
  const __m256i low = _mm256_shuffle_epi8(table.low, x.index),
                high = _mm256_shuffle_epi8(table.high, x.index);
  store_32(next.place(), _mm256_unpacklo_epi8(low, high));
  store_32(next.place(), _mm256_unpackhi_epi8(low, high));
}
