// Rows of int8 codes as products take them. Included inside a target's namespace, after its vectors and
// before the formats, whose Unpack<F>::Row gives
//   segment, tail            what a product of bf16 takes of elements [k, k + kStep) or fewer: decoded values
//   weights, weights_tail    the same with the row scale, rounded to bf16: where rows are summed over
//   bytes, bytes_tail        of whole numbers, what an integer product takes of [k, k + kByteStep)

inline constexpr size_t kByteStep = 2 * Vec::kStep;

template <class Row>
concept UnpackRow = requires(const Row& row, const WeightView& w, size_t n, size_t k, size_t count) {
  Row(w, n);
  { row.segment(k) } -> std::same_as<Vec::Segment>;
  { row.tail(k, count) } -> std::same_as<Vec::Segment>;
  { row.weights(k) } -> std::same_as<Vec::Segment>;
  { row.weights_tail(k, count) } -> std::same_as<Vec::Segment>;
};
template <class Row>
concept UnpackIntegerRow = UnpackRow<Row> && requires(const Row& row, size_t k, size_t count) {
  { row.bytes(k) } -> std::same_as<Vec::Bytes>;
  { row.bytes_tail(k, count) } -> std::same_as<Vec::Bytes>;
};

// What follows from a row's `codes`, `codes_tail` and `scale`; `bytes` is the row's own.
template <class Row>
struct CodeRow {
  KT_INLINE const Row& row() const { return static_cast<const Row&>(*this); }
  KT_INLINE Vec::Segment segment(size_t k) const { return Vec::to_segment(row().codes(k)); }
  KT_INLINE Vec::Segment tail(size_t k, size_t count) const {
    return Vec::to_segment(row().codes_tail(k, count));
  }
  KT_INLINE Vec::Segment weights(size_t k) const { return Vec::to_segment(row().codes(k), row().scale); }
  KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const {
    return Vec::to_segment(row().codes_tail(k, count), row().scale);
  }
  KT_INLINE Vec::Bytes bytes_tail(size_t k, size_t count) const {
    if (count <= Vec::kStep) return Vec::join(row().codes_tail(k, count), Vec::no_codes());
    return Vec::join(row().codes(k), row().codes_tail(k + Vec::kStep, count - Vec::kStep));
  }
};

#if !KT_HAS_AVX512_BF16  // of whose vectors bytes_avx2.h has better
// Nibbles as they are packed, to be looked up.
using Nibbles32 = Bytes32;
// Of 16 bytes: the low ones, then the high ones.
KT_INLINE Nibbles32 packed_in_16(const std::byte* p) { return nibbles_of_16(p); }
// The low or the high ones of 32 bytes.
KT_INLINE Nibbles32 packed_in_32(const std::byte* p, bool high) {
  return bits_of(load_32(p), high ? 4 : 0, 15);
}
#endif

// The whole numbers of a format's nibbles.
template <class Format>
struct NibbleCodes {
  alignas(16) int8_t of[16] = {};
  constexpr NibbleCodes() {
    for (int nibble = 0; nibble < 16; ++nibble) of[nibble] = Format::code(nibble);
  }
  constexpr unsigned char nibble_of_zero() const {
    unsigned char nibble = 0;
    while (of[nibble] != 0) ++nibble;
    return nibble;
  }
};
template <class Format>
inline constexpr NibbleCodes<Format> kNibbleCodes;

// The numbers of a table in float32.
template <const auto& kTable>
struct FloatTable {
  alignas(kCacheLine) float of[16] = {};
  constexpr FloatTable() {
    for (int i = 0; i < 16; ++i) of[i] = kTable[i];
  }
};
template <const auto& kTable>
inline constexpr FloatTable<kTable> kFloatTable;

// Those times a scale of a byte, by the byte, where that is exact.
template <class Format>
struct ScaledNumbers {
  Vec::Numbers of[256] = {};
  constexpr ScaledNumbers() {
    for (int bits = 0; bits < 256; ++bits) {
      const std::byte scale{static_cast<unsigned char>(bits)};
      for (int nibble = 0; nibble < 16; ++nibble)
        of[bits].set(nibble, product_in_bf16(Format::code(nibble), Format::scale(&scale, 0)));
    }
  }
};
template <class Format>
inline constexpr ScaledNumbers<Format> kScaledNumbers;

// A row of nibbles whose scales lie apart. Where vectors look up scaled numbers, the row's own
// `looked_up(nibbles, k, count)` does it.
template <class Row, class Format>
struct NibbleRow {
  const std::byte *data, *scales;
  NibbleRow() = default;
  KT_INLINE NibbleRow(const WeightView& w, size_t n)
      : data(w.row(n)), scales(w.scales_of(n, Format::kScaleRows)) {}

  KT_INLINE Vec::Segment segment(size_t k) const { return scaled(data + k / 2, k, Vec::kStep); }
  // Behind the row stand zeros: with a large scale any other number could become an infinity, which times the
  // zero of an activation is NaN. So the unused nibble of an odd row is not believed either.
  KT_INLINE Vec::Segment tail(size_t k, size_t count) const {
    constexpr auto zero = kNibbleCodes<Format>.nibble_of_zero();
    std::byte full[Vec::kStep / 2];
    std::memset(full, zero | zero << 4, sizeof full);
    std::memcpy(full, data + k / 2, count / 2);
    if (count % 2 != 0) full[count / 2] = data[(k + count) / 2] & std::byte{15} | std::byte{zero << 4};
    return scaled(full, k, count);
  }
  KT_INLINE Vec::Segment weights(size_t k) const { return segment(k); }
  KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const { return tail(k, count); }

 protected:
  KT_INLINE Vec::Segment by_codes(const std::byte* nibbles, size_t k, [[maybe_unused]] size_t count) const {
    const Vec::Codes codes = Vec::look_up(nibbles, kNibbleCodes<Format>.of);
    const float scale = Format::scale(scales, k);
    if constexpr (Vec::kStep <= Format::kGroup) {
      return Vec::to_segment(codes, scale);
    } else {
      static_assert(Vec::kStep <= 2 * Format::kGroup);
      const bool has_second = count > Format::kGroup;
      return Vec::to_segment(codes, scale, has_second ? Format::scale(scales, k + Format::kGroup) : 0.0f);
    }
  }

 private:
  KT_INLINE Vec::Segment scaled(const std::byte* nibbles, size_t k, size_t count) const {
    if constexpr (Vec::kLooksUpScaled) {
      return static_cast<const Row&>(*this).looked_up(nibbles, k, count);
    } else {
      return by_codes(nibbles, k, count);
    }
  }
};
