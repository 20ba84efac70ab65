// Scales that are bytes, of eight rows at a time. Included inside a target's namespace, after
// ints_portable.h.

// Half of the powers of two that bytes are in E8M0; 255 is NaN.
inline Floats8 half_of_e8m0(const Ints8& bytes) {
  Floats8 x;
  for (size_t i = 0; i < 8; ++i) x.lane[i] = halved(e8m0_to_float(static_cast<uint8_t>(bytes.lane[i])));
  return x;
}
// The same, but 255 is one of them.
inline Floats8 half_of_exponents(const Ints8& bytes) {
  Floats8 x;
  for (size_t i = 0; i < 8; ++i)
    x.lane[i] = formats::GgufMxFp4::kScaleValues[static_cast<size_t>(bytes.lane[i])];
  return x;
}
// Half of the numbers that bytes are in E4M3.
inline Floats8 half_of_e4m3(const Ints8& bytes) {
  Floats8 x;
  for (size_t i = 0; i < 8; ++i) x.lane[i] = halved(kE4m3[static_cast<size_t>(bytes.lane[i])]);
  return x;
}
