// Integers of a format, for products with activations in int8: what their loops take of it. Included inside a
// target's namespace, after blocks-inl.h and formats. `Integers<F>` has
//
//   kBlock, kGroup            activations that share a scale; weights that do, at most a block
//   kBias, kNarrow            a code is an integer plus kBias, not negative; codes are at most 129
//   codes(rows, r, k)         the 32 codes of a row from k on, a multiple of 32
//   open(rows, group)         the float32 scales of eight rows, of the groups of a block of activations that
//                             begins with `group`: `scale(g)` of group + g; offsets(rows, group) if
//                             kHasOffset
//   kScalesSums               the channel scale multiplies the sums, else it is among the scales of groups
//   kHasTwo                   32 codes from each of two places are cheaper together:
//   two(rows, r, k, second, codes)  those from k and `second` on; a half of each vector is of one place
//   order_two(a, b, x)        the activations of the places in that order
//   kHasFactors               a block's groups have integer factors, Format::group_numbers(), which belong to
//                             the integers; offsets are then those of a block

// Eight rows of a matrix. `scales` are separate, or stand behind the codes of a row.
struct EightRows {
  const std::byte* data;
  ptrdiff_t stride;
  const std::byte* scales;
  ptrdiff_t scales_stride;
  const float* channel_scale;
  bool is_one;  // row, eight times

  KT_INLINE const std::byte* row(int r) const { return data + r * stride; }
  KT_INLINE Floats8 channel_scales() const { return is_one ? set_8(*channel_scale) : load_8(channel_scale); }

  template <class Format>
  static EightRows of(const WeightView& w, size_t n) {
    const float* channel_scale = w.channel_scale ? w.channel_scale + n : nullptr;
    EightRows rows{w.row(n), w.row_stride_bytes, nullptr, 0, channel_scale, false};
    if constexpr (Format::kScaleRows == 1) {
      rows.scales = w.block_scales_of(n, 1), rows.scales_stride = w.block_scales_stride_bytes;
    } else if constexpr (requires { Format::code_bytes(0); }) {
      rows.scales = rows.data + Format::code_bytes(w.k), rows.scales_stride = w.row_stride_bytes;
    }
    return rows;
  }
  // Those `n` rows behind.
  KT_INLINE EightRows behind(ptrdiff_t n) const {
    EightRows rows = *this;
    rows.data += n * stride;
    return rows;
  }
  // Row n eight times.
  template <class Format>
  static EightRows repeated(const WeightView& w, size_t n) {
    EightRows rows = of<Format>(w, n);
    rows.stride = rows.scales_stride = 0, rows.is_one = true;
    return rows;
  }
};

KT_INLINE Floats8 eight_floats(const std::byte* p, ptrdiff_t stride) {
  float x[8];
  for (ptrdiff_t r = 0; r < 8; ++r) std::memcpy(x + r, p + r * stride, sizeof *x);
  return load_8(x);
}
// Eight bytes as numbers of a table.
KT_INLINE Floats8 eight_looked_up(const std::byte* p, ptrdiff_t stride, const float* table) {
  float x[8];
  for (ptrdiff_t r = 0; r < 8; ++r) x[r] = table[static_cast<uint8_t>(p[r * stride])];
  return load_8(x);
}

// ---- codes ----

// What the nibbles of a format stand for.
template <class Format>
constexpr int integer_of_nibble(int nibble) {
  if constexpr (BlockFormat<Format>) {
    return Unpack<Format>::kTable[nibble];
  } else {
    return Format::code(nibble);
  }
}

// The same with `bias` added, as unsigned bytes.
template <class Format, int kBias>
struct BiasedTable {
  alignas(16) int8_t of[16] = {};
  bool is_identity = true;
  constexpr BiasedTable() {
    for (int i = 0; i < 16; ++i) {
      const int code = integer_of_nibble<Format>(i) + kBias;
      of[i] = static_cast<int8_t>(static_cast<uint8_t>(code));
      if (code != i) is_identity = false;
    }
  }
};
template <class Format, int kBias>
inline constexpr BiasedTable<Format, kBias> kBiasedTable;

template <IntegerFormat Format>
struct IntegerCodes {
  static constexpr uint32_t kBlock = activation_block<Format>();
  static constexpr int kLeast = Format::kIntegers.least;
  static constexpr int kBias =
      kLeast >= 0 ? 0 : static_cast<int>(std::bit_ceil(static_cast<unsigned>(-kLeast)));
  static constexpr bool kNarrow = Format::kIntegers.most + kBias <= 129;
  static_assert(Format::kIntegers.most + kBias <= 255);

  static KT_INLINE Bytes32 looked_up(const Bytes32& nibbles) {
    if constexpr (kBiasedTable<Format, kBias>.is_identity) return nibbles;
    return look_up_32(nibbles, kBiasedTable<Format, kBias>.of);
  }
  static KT_INLINE Bytes32 biased(const Bytes32& integers) {
    if constexpr (kBias == 0) return integers;
    return minus(integers, -kBias);
  }
};

// Where packed nibbles of 32 values are: 16 bytes, the low ones first.
struct NibblesAt {
  static KT_INLINE const std::byte* in_16(const std::byte* p) { return p; }
  static KT_INLINE void in_32(const std::byte*, bool) {}
};
template <class Format>
concept HasNibblesIn16 = requires(const std::byte* block) {
  { Unpack<Format>::template nibbles<NibblesAt>(block, 0) } -> std::same_as<const std::byte*>;
};

// The scales of groups, read one by one.
template <class Of>
struct ScalesByGroup {
  const EightRows& rows;
  size_t group;
  KT_INLINE Floats8 scale(size_t g) const { return Of::scales(rows, group + g); }
};

template <IntegerFormat Format>
struct Integers;

// Blocks of GGUF.
template <IntegerFormat Format>
  requires BlockFormat<Format>
struct Integers<Format> : IntegerCodes<Format> {
  using Base = IntegerCodes<Format>;
  static constexpr bool kHasFactors = Format::kBlock == 256 && Format::kGroup < 256;
  static constexpr bool kHasOffset = Format::kHasOffset, kScalesSums = false;
  static constexpr size_t kGroup = kHasFactors ? 256 : Format::kGroup;

  static KT_INLINE const std::byte* block(const std::byte* row, size_t k) {
    return row + k / Format::kBlock * Format::kBlockBytes;
  }
  static KT_INLINE Bytes32 codes(const EightRows& rows, int r, size_t k) {
    const std::byte* at = block(rows.row(r), k);
    const size_t g = k % Format::kBlock / 32;
    if constexpr (requires { Unpack<Format>::kTable; }) {
      return Base::looked_up(Unpack<Format>::template nibbles<PlainNibbles>(at, g));
    } else {
      return Base::biased(group_numbers<Format>(at, g));
    }
  }
  static KT_INLINE auto open(const EightRows& rows, size_t group) {
    return ScalesByGroup<Integers>{rows, group};
  }
  static KT_INLINE Floats8 scales(const EightRows& rows, size_t group) {
    const std::byte* at = block(rows.data, group * kGroup);
    if constexpr (requires { Format::scale_at(at); }) {
      float x[8];
      for (ptrdiff_t r = 0; r < 8; ++r) x[r] = Format::scale_at(at + r * rows.stride);
      return load_8(x);
    } else if constexpr (requires(Ints8 bytes) { Unpack<Format>::scale_of_byte(bytes); }) {
      return Unpack<Format>::scale_of_byte(eight_bytes(at, rows.stride));
    } else if constexpr (requires { Format::kScaleValues; }) {
      return eight_looked_up(at + group % (Format::kBlock / kGroup), rows.stride,
                             Format::kScaleValues.data());
    } else {
      const Floats8 halves = eight_halves(at + Format::kScaleAt, rows.stride);
      if constexpr (requires { Format::kScaleFactor; }) return mul_8(halves, set_8(Format::kScaleFactor));
      return halves;
    }
  }
  static constexpr bool kHasTwo = HasNibblesIn16<Format>;
#if KT_HAS_256_BITS
  static KT_INLINE void two(const EightRows& rows, int r, size_t k, size_t second, Bytes32 (&codes)[2]) {
    const auto at = [&](size_t value) {
      const size_t g = value % Format::kBlock / 32;
      return Unpack<Format>::template nibbles<NibblesAt>(block(rows.row(r), value), g);
    };
    const Bytes32 both = Format::kBlock > 32 ? load_32(at(k)) : two_halves(at(k), at(second));
    codes[0] = Base::looked_up(low_nibbles(both));
    codes[1] = Base::looked_up(high_nibbles(both));
  }
  static KT_INLINE void order_two(Bytes32 a, Bytes32 b, Bytes32 (&x)[2]) { by_halves(a, b, x); }
#endif
  static KT_INLINE Floats8 offsets(const EightRows& rows, size_t group) {
    return eight_halves(block(rows.data, group * kGroup) + Format::kOffsetAt, rows.stride);
  }
};

// Nibbles in pairs, with separate scales.
template <IntegerFormat Format>
  requires(Format::kScaleRows == 1)
struct Integers<Format> : IntegerCodes<Format> {
  using Base = IntegerCodes<Format>;
  static constexpr bool kHasFactors = false, kHasOffset = false, kScalesSums = Format::kHasChannelScale;
  static constexpr size_t kGroup = Format::kGroup;

  static KT_INLINE Bytes32 codes(const EightRows& rows, int r, size_t k) {
    return Base::looked_up(pairs_of_16(rows.row(r) + k / 2));
  }
  static constexpr bool kHasTwo = true;
#if KT_HAS_256_BITS
  static KT_INLINE void two(const EightRows& rows, int r, size_t k, size_t, Bytes32 (&codes)[2]) {
    const Bytes32 both = load_32(rows.row(r) + k / 2);
    codes[0] = Base::looked_up(low_nibbles(both));
    codes[1] = Base::looked_up(high_nibbles(both));
  }
  static KT_INLINE void order_two(Bytes32 a, Bytes32 b, Bytes32 (&x)[2]) { by_parity(a, b, x); }
#endif
  // The scales of a block of activations, read in dwords where they are as long.
  static constexpr size_t kScaleSize = Format::scale_bytes(1),
                          kScaleBytes = Base::kBlock / kGroup * kScaleSize;
  struct ScalesOfBlock {
    Ints8 dwords[div_up(kScaleBytes, size_t{4})];
    KT_INLINE Floats8 scale(size_t g) const {
      constexpr size_t kIn = 4 / kScaleSize;
      if constexpr (kScaleSize == sizeof(bf16)) {
        return bf16_of_dwords(dwords[g / kIn], g % kIn);
      } else {
        return Unpack<Format>::scale_of_byte(byte_of_dwords(dwords[g / kIn], g % kIn));
      }
    }
  };
  static KT_INLINE auto open(const EightRows& rows, size_t group) {
    if constexpr (kScaleBytes < 4) {
      return ScalesByGroup<Integers>{rows, group};
    } else {
      ScalesOfBlock scales;
      KT_UNROLL for (size_t i = 0; i < kScaleBytes / 4; ++i) scales.dwords[i] =
          eight_dwords(rows.scales + group * kScaleSize + 4 * i, rows.scales_stride);
      return scales;
    }
  }
  static KT_INLINE Floats8 scales(const EightRows& rows, size_t group) {
    static_assert(kScaleSize == sizeof(bf16));
    return eight_bf16(rows.scales + group * kScaleSize, rows.scales_stride);
  }
};

// Codes in bytes, with scales behind them.
template <>
struct Integers<formats::Int8Group32> : IntegerCodes<formats::Int8Group32> {
  static constexpr bool kHasFactors = false, kHasOffset = false, kScalesSums = false, kHasTwo = false;
  static constexpr size_t kGroup = 32;
  static KT_INLINE Bytes32 codes(const EightRows& rows, int r, size_t k) {
    return biased(load_32(rows.row(r) + k));
  }
  static KT_INLINE auto open(const EightRows& rows, size_t group) {
    return ScalesByGroup<Integers>{rows, group};
  }
  static KT_INLINE Floats8 scales(const EightRows& rows, size_t group) {
    return eight_floats(rows.scales + group * sizeof(float), rows.scales_stride);
  }
};

// One scale per row: a group is a block of activations.
template <class Format>
struct IntegersOfChannels : IntegerCodes<Format> {
  static constexpr bool kHasFactors = false, kHasOffset = false, kScalesSums = false, kHasTwo = false;
  static constexpr size_t kGroup = 128;
  static KT_INLINE auto open(const EightRows& rows, size_t group) {
    return ScalesByGroup<IntegersOfChannels>{rows, group};
  }
  static KT_INLINE Floats8 scales(const EightRows& rows, size_t) { return rows.channel_scales(); }
};
template <>
struct Integers<formats::Int8> : IntegersOfChannels<formats::Int8> {
  static KT_INLINE Bytes32 codes(const EightRows& rows, int r, size_t k) {
    return biased(load_32(rows.row(r) + k));
  }
};
template <size_t kSize>
struct Integers<formats::Int4<kSize>> : IntegersOfChannels<formats::Int4<kSize>> {
  static KT_INLINE Bytes32 codes(const EightRows& rows, int r, size_t k) {
    const std::byte multiplier = rows.scales[r * rows.scales_stride + static_cast<ptrdiff_t>(k / kSize)];
    const int8_t* products = kInt4Products.codes[static_cast<uint8_t>(multiplier)];
    return Integers::biased(look_up_32(pairs_of_16(rows.row(r) + k / 2), products));
  }
};
