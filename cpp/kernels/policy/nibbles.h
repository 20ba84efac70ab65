// 32 packed nibbles, unpacked one per byte. Included inside a target's namespace, after its bytes.

struct PlainNibbles {
  // The low nibbles of 16 bytes, then the high ones.
  static KT_INLINE Bytes32 in_16(const std::byte* p) { return nibbles_of_16(p); }
  // The low or the high nibbles of 32 bytes.
  static KT_INLINE Bytes32 in_32(const std::byte* p, bool high) {
    return bits_of(load_32(p), high ? 4 : 0, 15);
  }
};
