// E4M3 without intrinsics. Included inside a target's namespace, after its vectors: models E4m3Decoder
// (formats/fp8.h).

struct E4m3 {
  static constexpr bool kDecodesTiles = false;
  static KT_INLINE Vec::Segment segment(const std::byte* p, float scale) {
    Vec::Segment s;
    for (size_t i = 0; i < Vec::kStep; ++i)
      s.lane[i] = to_float(to_bf16(kE4m3[static_cast<uint8_t>(p[i])] * scale));
    return s;
  }
};
