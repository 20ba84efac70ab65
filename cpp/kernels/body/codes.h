// Rows of int8 codes as products take them. Included inside a target's namespace, after its vectors and
// before the formats, whose Unpack<F>::Row gives
//   segment, tail            what a product of bf16 takes of elements [k, k + kStep) or fewer: decoded values
//   weights, weights_tail    the same with the row scale, rounded to bf16: where rows are summed over
//   bytes, bytes_tail        of whole numbers, what an integer product takes of [k, k + kByteStep)

inline constexpr size_t kByteStep = 2 * Vec::kStep;

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

// A row of nibbles, two a byte and the low one first, that stand for whole numbers times a scale of their
// group: what follows from its `data`, `scale(k)`, the table `kCodes` and the groups' `kGroup`. Where vectors
// look up scaled numbers, `looked_up(nibbles, k, count)` does it.
template <class Row, size_t kGroup>
struct NibbleRow {
  KT_INLINE const Row& row() const { return static_cast<const Row&>(*this); }
  KT_INLINE Vec::Segment segment(size_t k) const { return scaled(row().data + k / 2, k, Vec::kStep); }
  KT_INLINE Vec::Segment tail(size_t k, size_t count) const {
    std::byte full[Vec::kStep / 2] = {};
    std::memcpy(full, row().data + k / 2, div_up(count, 2));
    return scaled(full, k, count);
  }
  KT_INLINE Vec::Segment weights(size_t k) const { return segment(k); }
  KT_INLINE Vec::Segment weights_tail(size_t k, size_t count) const { return tail(k, count); }

 private:
  KT_INLINE Vec::Segment scaled(const std::byte* nibbles, size_t k, [[maybe_unused]] size_t count) const {
    if constexpr (Vec::kLooksUpScaled) return row().looked_up(nibbles, k, count);
    return by_codes(nibbles, k, count);
  }

 protected:
  KT_INLINE Vec::Segment by_codes(const std::byte* nibbles, size_t k, [[maybe_unused]] size_t count) const {
    const Vec::Codes codes = Vec::look_up(nibbles, Row::kCodes);
    if constexpr (Vec::kStep <= kGroup) {
      return Vec::to_segment(codes, row().scale(k));
    } else {
      static_assert(Vec::kStep <= 2 * kGroup);
      return Vec::to_segment(codes, row().scale(k), count > kGroup ? row().scale(k + kGroup) : 0.0f);
    }
  }
};
