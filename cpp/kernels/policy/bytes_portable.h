// 32 bytes, each an integer of its own, in plain arrays. Included inside a target's namespace, after Vec.

// Code on groups is not inlined: that would take compilers minutes.
#undef KT_INLINE_GROUP
#define KT_INLINE_GROUP __attribute__((noinline))

struct Bytes32 {
  uint8_t lane[32];
};

#define KT_MAP_32(expression)                                                   \
  Bytes32 r;                                                                    \
  for (size_t i = 0; i < 32; ++i) r.lane[i] = static_cast<uint8_t>(expression); \
  return r

KT_INLINE Bytes32 load_32(const std::byte* p) { KT_MAP_32(p[i]); }
KT_INLINE void store_32(std::byte* p, const Bytes32& x) { std::memcpy(p, x.lane, sizeof x.lane); }
// The nibbles of 16 bytes: the low ones, then the high ones.
KT_INLINE Bytes32 nibbles_of_16(const std::byte* p) {
  KT_MAP_32(static_cast<int>(p[i % 16]) >> (i / 16 * 4) & 15);
}
// The nibbles of 16 bytes in pairs, the low one of a byte first.
KT_INLINE Bytes32 pairs_of_16(const std::byte* p) {
  KT_MAP_32(static_cast<int>(p[i / 2]) >> (i % 2 * 4) & 15);
}
// The bits of each byte from `shift` on that are in the mask.
KT_INLINE Bytes32 bits_of(const Bytes32& x, size_t shift, int mask) { KT_MAP_32(x.lane[i] >> shift & mask); }
// The 32 bits of 4 bytes, one per byte.
KT_INLINE Bytes32 spread_bits(const std::byte* p) { KT_MAP_32(static_cast<int>(p[i / 8]) >> (i % 8) & 1); }
// low | high << kShift, which fits into a byte.
template <int kShift>
KT_INLINE Bytes32 with_bits(const Bytes32& low, const Bytes32& high) {
  KT_MAP_32(low.lane[i] | high.lane[i] << kShift);
}
KT_INLINE Bytes32 minus(const Bytes32& x, int n) { KT_MAP_32(x.lane[i] - n); }
// table[x] for nibbles x.
KT_INLINE Bytes32 look_up_32(const Bytes32& x, const int8_t* table) { KT_MAP_32(table[x.lane[i]]); }
// Bytes [i, i + kStep) as the codes of a segment.
KT_INLINE Vec::Codes codes_of(const Bytes32& x, size_t i) {
  Vec::Codes codes;
  std::memcpy(codes.lane, x.lane + i, sizeof codes.lane);
  return codes;
}

#undef KT_MAP_32
