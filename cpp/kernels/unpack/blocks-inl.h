// Block formats (formats/blocks.h) for products: a function of the format decodes a run of a row to bf16 in
// scratch; the loops are one for all of them, `AnyBlockFormat` in place of a
// format. Included inside a target's namespace, after its vectors and formats.

// Adjacent elements in the output of a run: those that products take of a row at a time.
#if KT_HAS_TILES
inline constexpr size_t kRunElements = 32;
#else
inline constexpr size_t kRunElements = Vec::kStep;
#endif
static_assert(kRunElements % Vec::kStep == 0);
// Elements that one call should at least take, but at the end of a row: those of the largest block.
inline constexpr uint32_t kBlockElements = 256;

template <class Format>
concept BlockFormat = requires { Format::kBlock; };
template <class Format>
concept PlainFormat = BlockFormat<Format> && Format::kBlock == 1;

// Decoded in registers, where others are decoded a group at a time by code for any machine.
template <class Format>
concept HasUnpack = requires { sizeof(Unpack<Format>); };

// Whose blocks have one scale, which is read where it is.
template <class Format>
concept HasScaleInBlock = requires(const std::byte* block) { Unpack<Format>::scale(block); };

// Scale and offset of the values from i on of group g of a block.
template <class Format>
struct GroupScale {
  Vec::Float scale, offset;
  KT_INLINE GroupScale(const std::byte* block, const typename Format::Scales& scales, size_t g, size_t i) {
    if constexpr (HasScaleInBlock<Format>) {
      scale = Vec::without_payload(Unpack<Format>::scale(block));
      if constexpr (Format::kHasOffset) offset = Vec::without_payload(Unpack<Format>::offset(block));
    } else {
      const size_t at = (32 * g + i) / Format::kGroup;
      scale = Vec::set(scales.scale[at]);
      if constexpr (Format::kHasOffset) offset = Vec::set(scales.offset[at]);
    }
  }
  KT_INLINE Vec::Float of(Vec::Float number) const {
    if constexpr (Format::kHasOffset) return Vec::fma(number, scale, offset);
    return Vec::mul(number, scale);
  }
};

KT_INLINE void scale_numbers(Vec::Float scale, const uint64_t* numbers, size_t count, float* to) {
  for (size_t g = 0; g < count; g += Vec::kWidth)
    Vec::store_f(to + g, Vec::mul(scale, Vec::int8_of(numbers, g)));
}

// The scales of a block, of formats that do not read them where they are.
template <class Format>
KT_INLINE void open_block(const std::byte* block, typename Format::Scales& scales) {
  if constexpr (HasScaleInBlock<Format>) return;
  if constexpr (requires(formats::GroupNumbers& numbers) { Format::group_numbers(block, numbers); }) {
    formats::GroupNumbers numbers;
    Format::group_numbers(block, numbers);
    const uint16_t bits = Format::scale_bits(block);
    const Vec::Float scale = Vec::without_payload(Vec::half(reinterpret_cast<const std::byte*>(&bits)));
    scale_numbers(Vec::mul(scale, Vec::set(Format::kScaleFactor)), numbers.scale, Format::kGroups,
                  scales.scale);
    if constexpr (Format::kHasOffset) {
      const Vec::Float other = Vec::without_payload(Vec::half(block + Format::kOffsetAt));
      const Vec::Float minus = Vec::sub(Vec::set(0.0f), other);
      scale_numbers(minus, numbers.offset, Format::kGroups, scales.offset);
    }
  } else if constexpr (!HasScaleInBlock<Format>) {
    Format::scales(block, scales);
    constexpr size_t kGroups = Format::kBlock / Format::kGroup;
    for (size_t g = 0; g < kGroups; ++g) {
      if (std::isnan(scales.scale[g])) scales.scale[g] = std::numeric_limits<float>::quiet_NaN();
      if (Format::kHasOffset && std::isnan(scales.offset[g]))
        scales.offset[g] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// The numbers of group g, of formats without lookup tables.
template <class Format>
KT_INLINE Bytes32 group_numbers(const std::byte* block, size_t g) {
  if constexpr (requires { Unpack<Format>::numbers(block, g); }) {
    return Unpack<Format>::numbers(block, g);
  } else {
    int8_t numbers[32];
    if constexpr (requires { Format::group(block, g, numbers); }) {
      Format::group(block, g, numbers);
    } else {
      for (size_t i = 0; i < 32; ++i) numbers[i] = static_cast<int8_t>(Format::number(block, 32 * g + i));
    }
    return load_32(reinterpret_cast<const std::byte*>(numbers));
  }
}

// Values of group g of a block, kStep of them at every place that `next` gives.
template <class Format, class Next>
KT_INLINE_GROUP void store_group(const std::byte* block, const typename Format::Scales& scales, size_t g,
                                 Next& next) {
  using Of = Unpack<Format>;
  if constexpr (Vec::kLooksUpScaled && requires { Of::kTable; }) {
    const GroupScale<Format> by(block, scales, g, 0);
    Vec::Float numbers[16 / Vec::kWidth];
    KT_UNROLL for (size_t i = 0; i < 16 / Vec::kWidth; ++i) numbers[i] =
        by.of(Vec::load_f(kFloatTable<Of::kTable>.of + i * Vec::kWidth));
    store_looked_up(next, Of::nibbles(block, g), numbers);
  } else if constexpr (Vec::kLooksUpScaled && requires { Of::zero(block); }) {
    const GroupScale<Format> by(block, scales, g, 0);
    const auto zero = Vec::set(static_cast<float>(Of::zero(block)));
    Vec::Float numbers[16 / Vec::kWidth];
    KT_UNROLL for (size_t i = 0; i < 16 / Vec::kWidth; ++i) numbers[i] =
        by.of(Vec::sub(Vec::load_f(kFloatTable<kFromZero>.of + i * Vec::kWidth), zero));
    store_looked_up(next, Of::packed(block, g), numbers);
  } else {
    Bytes32 numbers;
    if constexpr (requires { Of::kTable; }) {
      numbers = look_up_32(Of::nibbles(block, g), Of::kTable);
    } else {
      numbers = group_numbers<Format>(block, g);
    }
    constexpr size_t kParts = Vec::kStep / Vec::kWidth;
    static_assert(Format::kGroup % Vec::kWidth == 0 && 32 % Vec::kStep == 0);
    KT_UNROLL for (size_t i = 0; i < 32; i += Vec::kStep) {
      Vec::Float x[kParts];
      Vec::to_floats(codes_of(numbers, i), x);
      KT_UNROLL for (size_t part = 0; part < kParts; ++part) x[part] =
          GroupScale<Format>(block, scales, g, i + part * Vec::kWidth).of(x[part]);
      Vec::store_scaled(next.place(), x);
    }
  }
}

// Where runs of a row go.
class RunWriter {
 public:
  KT_INLINE RunWriter(std::byte* to, ptrdiff_t stride) : to_(to), stride_(stride) {}
  // That of the next kStep elements.
  KT_INLINE std::byte* place() {
    std::byte* place = to_ + at_ * sizeof(bf16);
    at_ += Vec::kStep;
    if (at_ == kRunElements) at_ = 0, to_ += stride_;
    return place;
  }

 private:
  std::byte* to_;
  const ptrdiff_t stride_;
  size_t at_ = 0;
};

// kStep plain numbers, rounded.
template <PlainFormat Format>
KT_INLINE void store_plain(const std::byte* numbers, std::byte* to) {
  constexpr size_t kParts = Vec::kStep / Vec::kWidth;
  Vec::Float x[kParts];
  KT_UNROLL for (size_t part = 0; part < kParts; ++part) x[part] =
      Unpack<Format>::load(numbers + Format::row_bytes(part * Vec::kWidth));
  Vec::store_rounded(to, x);
}

using UnpackFunction = void (*)(const std::byte* row, size_t k0, size_t k1, std::byte* to, ptrdiff_t stride);
// By format; null for those without blocks. Defined in targets/table.cpp.
extern const UnpackFunction kUnpackFunctions[kNumFormats];

// Columns [k0, k1) of row n, rounded to bf16 with all their scales. Written are whole vectors.
using DecodeFunction = void (*)(const WeightView& w, uint32_t n, uint32_t k0, uint32_t k1, std::byte* to);
extern const DecodeFunction kDecodeFunctions[kNumFormats];

// What stands for a format of blocks in the loops of products: the view of a matrix says which one it is.
struct AnyBlockFormat {
  static constexpr size_t row_bytes(size_t k) { return k; }  // about: how much is prefetched
  static KT_INLINE void unpack(const WeightView& w, size_t n, size_t k0, size_t k1, std::byte* to,
                               ptrdiff_t stride) {
    kUnpackFunctions[static_cast<size_t>(w.format)](w.row(n), k0, k1, to, stride);
  }
};
template <>
struct Unpack<AnyBlockFormat> {
  static constexpr bool kUsedAsStored = false;
};

// What loops over a format take in its place.
template <class Format>
using LoopFormat = std::conditional_t<BlockFormat<Format>, AnyBlockFormat, Format>;
