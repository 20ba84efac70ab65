// Rows of codes, dequantized in registers. Included inside a target's namespace, after its vectors and before
// the formats, whose Unpack<F>::Row provides
//   segment, tail            elements [k, k + kStep), or fewer, decoded: what bf16 products take
//   weights, weights_tail    the same times the channel scale, in bf16: for products that sum over rows
//   bytes, bytes_tail        integer formats only: elements [k, k + kByteStep) for integer products

inline constexpr size_t kByteStep = 2 * Vec::kStep;

// V is always Vec: gcc warns of vector types as template arguments where they do not depend on a parameter.
template <class Row, class V = Vec>
concept UnpackRow = requires(const Row& row, const WeightView& w, size_t n, size_t k, size_t count) {
  Row(w, n);
  { row.segment(k) } -> std::same_as<typename V::Segment>;
  { row.tail(k, count) } -> std::same_as<typename V::Segment>;
  { row.weights(k) } -> std::same_as<typename V::Segment>;
  { row.weights_tail(k, count) } -> std::same_as<typename V::Segment>;
};
template <class Row, class V = Vec>
concept UnpackIntegerRow = UnpackRow<Row, V> && requires(const Row& row, size_t k, size_t count) {
  { row.bytes(k) } -> std::same_as<typename V::Bytes>;
  { row.bytes_tail(k, count) } -> std::same_as<typename V::Bytes>;
};

// What follows from a row's `codes`, `codes_tail` and `scale`; a row defines `bytes` itself.
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

// The integer that each nibble of a format stands for.
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

// A table of 16 numbers as float32.
template <const auto& kTable>
struct FloatTable {
  alignas(kCacheLine) float of[16] = {};
  constexpr FloatTable() {
    for (int i = 0; i < 16; ++i) of[i] = kTable[i];
  }
};
template <const auto& kTable>
inline constexpr FloatTable<kTable> kFloatTable;

template <const auto& kTable>
KT_INLINE void scaled_numbers(float scale, Vec::Float (&numbers)[16 / Vec::kWidth]) {
  KT_UNROLL for (size_t i = 0; i < 16 / Vec::kWidth; ++i) numbers[i] =
      Vec::mul(Vec::load_f(kFloatTable<kTable>.of + i * Vec::kWidth), Vec::set(scale));
}

// Where a group's scale is one byte: the 16 numbers of the format times the scale, indexed by that byte. The
// products are exact.
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

// A row of nibbles whose scales are a separate array. Where vectors look up scaled numbers (kLooksUpScaled),
// the row provides `looked_up(nibbles, k, count)`, and where it LooksUpTwo perhaps `two_segments(k, to)`.
template <class Row, class Format>
struct NibbleRow {
  const std::byte *data, *scales;
  NibbleRow() = default;
  KT_INLINE NibbleRow(const WeightView& w, size_t n)
      : data(w.row(n)), scales(w.block_scales_of(n, Format::kScaleRows)) {}

  KT_INLINE Vec::Segment segment(size_t k) const { return scaled(data + k / 2, k, Vec::kStep); }
  // Behind the end of the row are zeros: any other number times a large scale could become infinite, and
  // infinity times a zero activation is NaN. So the unused nibble of an odd row is replaced as well.
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
      static_assert(Vec::kStep <= 2 * Format::kGroup && ScalesHalves<Vec>);
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
