// 32 packed nibbles that are to be looked up: here they are unpacked at once, one per byte. Included inside a
// target's namespace, after its bytes.

using Nibbles32 = Bytes32;
// The low nibbles of 16 bytes, then the high ones.
KT_INLINE Nibbles32 packed_in_16(const std::byte* p) { return nibbles_of_16(p); }
// The low or the high nibbles of 32 bytes.
KT_INLINE Nibbles32 packed_in_32(const std::byte* p, bool high) {
  return bits_of(load_32(p), high ? 4 : 0, 15);
}
