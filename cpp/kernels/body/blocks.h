// Formats of blocks (formats/blocks.h) as products take them: a run of a row is taken apart and leaves bf16
// in scratch, by a function of the format; the loops are one for all of them, `AnyBlocks` in place of a
// format. Included inside a target's namespace, after its vectors and formats.

// Elements that lie side by side where runs are unpacked to: what products take of a row at a time.
#if defined(KT_HAS_TILES)
inline constexpr size_t kRunElements = 32;
#else
inline constexpr size_t kRunElements = Vec::kStep;
#endif
static_assert(kRunElements % Vec::kStep == 0);
// Elements that one call should at least take, but at the end of a row: those of the largest block.
inline constexpr uint32_t kBlockElements = 256;

template <class Format>
concept BlockFormat = requires { Format::kBlock; };

// One pass of a vector of numbers, of one group or, when it is wider, of two.
template <class Format>
KT_INLINE void store_numbers(const typename Format::Values& values, size_t i, std::byte* to) {
  constexpr size_t kParts = Vec::kStep / Vec::kWidth, kGroup = Format::Values::kGroup;
  static_assert(kGroup % Vec::kWidth == 0);
  Vec::Codes codes = Vec::load_codes(reinterpret_cast<const std::byte*>(values.number + i));
  if constexpr (requires { Format::kNumbers; }) codes = Vec::look_up_each(codes, Format::kNumbers.of);
  Vec::Float x[kParts];
  Vec::to_floats(codes, x);
  KT_UNROLL for (size_t part = 0; part < kParts; ++part) {
    const size_t group = (i + part * Vec::kWidth) / kGroup;
    const Vec::Float scale = Vec::set(values.scale[group]);
    if constexpr (Format::kHasOffset) {
      x[part] = Vec::fma(x[part], scale, Vec::set(values.offset[group]));
    } else {
      x[part] = Vec::mul(x[part], scale);
    }
  }
  Vec::store_rounded(to, x);
}

// Where runs of a row go.
class RunWriter {
 public:
  KT_INLINE RunWriter(std::byte* to, ptrdiff_t stride) : to_(to), stride_(stride) {}
  // The place of the next kStep elements.
  KT_INLINE std::byte* next() {
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

// Elements [k0, k1) of a row, kRunElements of them every `stride` bytes; k0 a multiple of 32, k1 the row's
// end or another. Behind the row's end zeros fill a vector.
template <class Format>
struct UnpackRun {
  static void run(const std::byte* row, size_t k0, size_t k1, std::byte* to, ptrdiff_t stride) {
    RunWriter out(to, stride);
    for (size_t k = k0; k < k1;) {
      const size_t block = k / Format::kBlock, begin = block * Format::kBlock;
      const size_t end = begin + Format::kBlock < k1 ? begin + Format::kBlock : k1;
      typename Format::Values values;
      Format::unpack(row + block * Format::kBlockBytes, values);
      for (; k < end; k += Vec::kStep) store_numbers<Format>(values, k - begin, out.next());
    }
  }
};

// Of plain numbers, by the compiler's vectors.
template <class Format>
  requires(Format::kBlock == 1)
struct UnpackRun<Format> {
  static void run(const std::byte* row, size_t k0, size_t k1, std::byte* to, ptrdiff_t stride) {
    RunWriter out(to, stride);
    constexpr size_t kBytes = Format::row_bytes(1);
    for (size_t k = k0; k < k1; k += Vec::kStep) {
      bf16 values[Vec::kStep] = {};
      const size_t count = k1 - k < Vec::kStep ? k1 - k : Vec::kStep;
      for (size_t i = 0; i < count; ++i) values[i] = to_bf16(Format::value_at(row + (k + i) * kBytes));
      std::memcpy(out.next(), values, sizeof values);
    }
  }
};
using UnpackFunction = void (*)(const std::byte* row, size_t k0, size_t k1, std::byte* to, ptrdiff_t stride);
template <class Format>
constexpr UnpackFunction unpack_function() {
  if constexpr (BlockFormat<Format>) {
    return UnpackRun<Format>::run;
  } else {
    return nullptr;
  }
}
inline constexpr UnpackFunction kUnpackFunctions[] = {
#define KT_FORMAT(id, type) unpack_function<formats::type>(),
#include "formats/formats.inc"
#undef KT_FORMAT
};

// What stands for a format of blocks in the loops of products: the view of a matrix says which one it is.
struct AnyBlocks {
  static constexpr size_t row_bytes(size_t k) { return k; }  // about: how much is asked for ahead
  static KT_INLINE void unpack(const WeightView& w, size_t n, size_t k0, size_t k1, std::byte* to,
                               ptrdiff_t stride) {
    kUnpackFunctions[static_cast<size_t>(w.format)](w.row(n), k0, k1, to, stride);
  }
};
template <>
struct Unpack<AnyBlocks> {
  static constexpr bool kAsStored = false;
};

// What loops over a format take in its place.
template <class Format>
struct LoopFormatOf {
  using type = Format;
};
template <BlockFormat Format>
struct LoopFormatOf<Format> {
  using type = AnyBlocks;
};
template <class Format>
using LoopFormat = typename LoopFormatOf<Format>::type;

// Bytes of the first k elements of a row.
template <class Format>
KT_INLINE size_t row_bytes_of(const WeightView& w, size_t k) {
  if constexpr (std::is_same_v<Format, AnyBlocks>) {
    return format_row_bytes(w.format, k);
  } else {
    return Format::row_bytes(k);
  }
}
