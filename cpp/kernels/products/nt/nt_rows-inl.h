// NT, rows dot rows: C[m, n - n0] (+)= sum_k X[m, k] W[n, k].
//
// A register tile is kRowTile weight rows x kTokenTile activation rows, one accumulator of lanes an output.
// The lanes of every output see K in steps of kStep, whatever the tile, and are added by one tree; that is
// the order that makes results independent of the batch. A group of weight rows stays in the L1
// cache while the activations of the panel pass, so weights are read from memory once.
//
// Long rows are taken in blocks of K, the lanes kept in scratch from block to block: the order of the sum
// does not change. With few activations weights are multiplied in place, with many they are
// packed to bf16 in scratch first: rows a power of two apart would compete for the same cache sets, and rows
// that straddle cache lines or have to be decoded would pay for it with every token.
//
// A Product defines the operands: bf16 into fp32, or int8 codes into int32. Blocks, panels and tiles are
// counted in bytes of activations, which are the same for both.
//
// C is row-major: c[m * ld + (n - n0)], ld = c_stride(n1 - n0).

// Bytes of a row of activations in a block, in place and packed. Packed weights take half of an L1 cache of
// 32 KiB, the rest is for activations.
inline constexpr size_t kBlockBytes = 4096, kPackedBlockBytes = 2048;
// From this many activation rows on, packing weights that could be used in place costs less than it saves.
inline constexpr uint32_t kPackFromRows = 14;
inline constexpr size_t kSegmentBytes = Vec::kStep * sizeof(bf16);

// bf16 by bf16. `Row` is a row of weights of some format.
struct Bf16Product {
  static constexpr size_t kElementBytes = sizeof(bf16), kStep = Vec::kStep;
  template <class Format>
  static constexpr bool as_stored() {
    return Unpack<Format>::kUsedAsStored;
  }
  using Segment = Vec::Segment;
  using Acc = Vec::Acc;
  static KT_INLINE Acc zero() { return Vec::zero_acc(); }
  static KT_INLINE Segment load(const std::byte* p) { return Vec::load(p); }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    return Vec::load_partial(p, count);
  }
  static KT_INLINE void store(std::byte* p, const Segment& s) { Vec::store(p, s); }
  template <class Row>
  static KT_INLINE Segment weights(const Row& row, size_t k) {
    return row.segment(k);
  }
  template <class Row>
  static KT_INLINE Segment weights_tail(const Row& row, size_t k, size_t count) {
    return row.tail(k, count);
  }
  static KT_INLINE void dot(Acc& acc, const Segment& w, const Segment& x) { Vec::dot(acc, w, x); }
  template <int kRows>
  static KT_INLINE void sums(const NtArgs&, uint32_t, const Acc (&acc)[kRows], float* sums) {
    Vec::reduce(acc, sums);
  }
};

// int8 by int8.
struct Int8Product {
  static constexpr size_t kElementBytes = 1, kStep = kByteStep;
  template <class Format>
  static constexpr bool as_stored() {
    return Unpack<Format>::kBytesUsedAsStored;
  }
  using Segment = Vec::Bytes;
  using Acc = Vec::IntAcc;
  static KT_INLINE Acc zero() { return Vec::zero_int(); }
  static KT_INLINE Segment load(const std::byte* p) { return Vec::load_bytes(p); }
  static KT_INLINE Segment load_partial(const std::byte* p, size_t count) {
    return Vec::load_bytes_partial(p, count);
  }
  static KT_INLINE void store(std::byte* p, const Segment& s) { Vec::store_bytes(p, s); }
  template <class Row>
  static KT_INLINE Segment weights(const Row& row, size_t k) {
    return Vec::as_weights(row.bytes(k));
  }
  template <class Row>
  static KT_INLINE Segment weights_tail(const Row& row, size_t k, size_t count) {
    return Vec::as_weights(row.bytes_tail(k, count));
  }
  static KT_INLINE void dot(Acc& acc, const Segment& w, const Segment& x) { Vec::dot_bytes(acc, w, x); }
  // The sum of products from one whose weights were kWeightOffset too large. Modulo 2^32, as the sum of the
  // offsets alone may be beyond int32.
  static KT_INLINE int32_t without_offset(int32_t sum, int32_t sum_of_x) {
    const auto offsets = static_cast<uint32_t>(Vec::kWeightOffset) * static_cast<uint32_t>(sum_of_x);
    return static_cast<int32_t>(static_cast<uint32_t>(sum) - offsets);
  }
  // Of activation row m, with its scale.
  template <int kRows>
  static KT_INLINE void sums(const NtArgs& args, uint32_t m, const Acc (&acc)[kRows], float* sums) {
    const QuantizedRow& x = args.x.quantized_row(m);
    int32_t ints[kRows];
    Vec::reduce_int(acc, ints);
    for (int r = 0; r < kRows; ++r) sums[r] = static_cast<float>(without_offset(ints[r], x.sum)) * x.scale;
  }
};
static_assert(sizeof(Vec::IntAcc) <= sizeof(Vec::Acc));

KT_INLINE size_t c_stride(uint32_t n) { return round_up(n, 16); }
KT_INLINE bool is_aligned(const std::byte* data, ptrdiff_t stride) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride)) % kCacheLine == 0;
}

inline size_t c_floats_rows(uint32_t m, uint32_t n) { return m * c_stride(n); }

inline constexpr size_t kPackedWeightsBytes = size_t{Vec::kRowTile} * kPackedBlockBytes;

inline size_t nt_scratch_bytes_rows(uint32_t k) {
  const size_t lanes =
      k * sizeof(bf16) > kPackedBlockBytes ? size_t{kMaxCallRows} * Vec::kRowTile * sizeof(Vec::Acc) : 0;
  return kPackedWeightsBytes + lanes;
}

// Weights in place: row r of the group at its own address.
// kLines cache lines are prefetched at each step.
template <class Format, class Product, int kRows, int kLines>
struct InPlace {
  using Row = typename Unpack<Format>::Row;
  Row row[kRows];
  KT_INLINE InPlace(const WeightView& w, uint32_t n) {
    for (int r = 0; r < kRows; ++r) row[r] = Row(w, n + static_cast<uint32_t>(r));
  }
  // Prefetches faster than a line in two steps would evict data in use from the L1 cache, so they go to the
  // L2 cache (on Zen 4 a single token is 50 % faster).
  KT_INLINE void prefetch(const std::byte* ahead, size_t) const {
    KT_UNROLL for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + i * kCacheLine, 0, 2);
  }
  KT_INLINE typename Product::Segment segment(int r, size_t k) const { return Product::weights(row[r], k); }
  KT_INLINE void two_segments(int r, size_t k, typename Product::Segment (&to)[2]) const
    requires requires(const Row& of_one) { of_one.two_segments(k, to); } && std::same_as<Product, Bf16Product>
  {
    row[r].two_segments(k, to);
  }
  // The ends of rows, side by side. A loop: unrolled, this rarely executed code would be the longest part.
  KT_INLINE void store_tails(size_t k, size_t count, std::byte* to) const {
    KT_NO_UNROLL for (int r = 0; r < kRows; ++r)
        Product::store(to + r * kSegmentBytes, Product::weights_tail(row[r], k, count));
  }
};

// Packed weights: the segments of all rows of a step are adjacent, zeros follow the
// last.
template <class Product, int kRows>
struct PackedWeights {
  const std::byte* data;
  size_t k0;
  KT_INLINE void prefetch(const std::byte* ahead, size_t bytes) const {
    for (size_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(ahead + i, 0, 3);
  }
  KT_INLINE typename Product::Segment segment(int r, size_t k) const {
    return Product::load(data + (k - k0) * Product::kElementBytes * kRows + r * kSegmentBytes);
  }
  KT_INLINE void store_tails(size_t k, size_t, std::byte* to) const {
    std::memcpy(to, data + (k - k0) * Product::kElementBytes * kRows, kRows * kSegmentBytes);
  }
};

template <class Format, class Product, int kRows>
void pack_weights(const WeightView& w, uint32_t n, size_t k0, size_t k1, std::byte* packed) {
  for (int r = 0; r < kRows; ++r) {
    std::byte* to = packed + r * kSegmentBytes;
    if constexpr (std::is_same_v<Format, AnyBlockFormat>) {
      AnyBlockFormat::unpack(w, n + static_cast<uint32_t>(r), k0, k1, to, kRows * kSegmentBytes);
    } else {
      const typename Unpack<Format>::Row row(w, n + static_cast<uint32_t>(r));
      size_t k = k0;
      for (; k + Product::kStep <= k1; k += Product::kStep, to += kRows * kSegmentBytes)
        Product::store(to, Product::weights(row, k));
      if (k < k1) Product::store(to, Product::weights_tail(row, k, k1 - k));
    }
  }
}

// What the tiles of one group and one block of K share.
struct GroupBlock {
  uint32_t n;        // first weight row
  size_t k0, k1;     // the block
  std::byte* lanes;  // accumulators between blocks of K
};

// What is prefetched meanwhile: `step` bytes per step from `data` on, up to `bytes`.
struct Ahead {
  const std::byte* data;
  size_t bytes, step;
};

// Two steps of a single activation row.
template <class Product, int kRows, class Weights>
KT_INLINE void dot_two_steps(const Weights& w, size_t k, const std::byte* x, const std::byte* ahead,
                             size_t ahead_step, typename Product::Acc (&acc)[kRows]) {
  using Segment = typename Product::Segment;
  constexpr size_t kStep = Product::kStep;
  KT_UNROLL for (size_t i = 0; i < 2; ++i) w.prefetch(ahead + i * ahead_step, ahead_step);
  const Segment xs[2] = {Product::load(x + k * Product::kElementBytes),
                         Product::load(x + (k + kStep) * Product::kElementBytes)};
  KT_UNROLL for (int r = 0; r < kRows; ++r) {
    Segment ws[2];
    w.two_segments(r, k, ws);
    KT_UNROLL for (int i = 0; i < 2; ++i) Product::dot(acc[r], ws[i], xs[i]);
  }
}

template <class Product, int kRows, int kTokens, class Weights>
KT_INLINE void dot_tile(const NtArgs& args, const GroupBlock& b, const Weights& w, uint32_t m,
                        const Ahead& prefetched) {
  using Segment = typename Product::Segment;
  using Acc = typename Product::Acc;
  constexpr size_t kStep = Product::kStep, kElementBytes = Product::kElementBytes;
  const std::byte* x[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    const size_t row = args.x.index ? args.x.index[m + t] : m + t;
    x[t] = args.x.data + row * args.x.stride_bytes;
  }
  const std::byte* ahead = prefetched.bytes > 0 ? prefetched.data : x[0];  // or what is there

  Acc acc[kTokens][kRows];
  Acc* lanes = reinterpret_cast<Acc*>(b.lanes) + size_t{m} * kRows;
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) acc[t][r] = b.k0 == 0 ? Product::zero() : lanes[t * kRows + r];

  size_t k = b.k0;
  if constexpr (kTokens == 1 && requires(Segment(&two)[2]) { w.two_segments(0, k, two); }) {
    for (; k + 2 * kStep <= b.k1; k += 2 * kStep, ahead += 2 * prefetched.step)
      dot_two_steps<Product>(w, k, x[0], ahead, prefetched.step, acc[0]);
  }
  for (; k + kStep <= b.k1; k += kStep) {
    w.prefetch(ahead, prefetched.step);
    ahead += prefetched.step;
    Segment xs[kTokens];
    KT_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = Product::load(x[t] + k * kElementBytes);
    KT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Segment ws = w.segment(r, k);
      KT_UNROLL for (int t = 0; t < kTokens; ++t) Product::dot(acc[t][r], ws, xs[t]);
    }
  }
  if (k < b.k1) {
    Segment xs[kTokens];
    KT_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] =
        Product::load_partial(x[t] + k * kElementBytes, b.k1 - k);
    alignas(kCacheLine) std::byte tails[kRows * kSegmentBytes];
    w.store_tails(k, b.k1 - k, tails);
    KT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Segment ws = Product::load(tails + r * kSegmentBytes);
      KT_UNROLL for (int t = 0; t < kTokens; ++t) Product::dot(acc[t][r], ws, xs[t]);
    }
  }

  if (b.k1 < args.x.k) {
    for (int t = 0; t < kTokens; ++t)
      for (int r = 0; r < kRows; ++r) lanes[t * kRows + r] = acc[t][r];
    return;
  }
  const size_t ld = args.c_stride ? args.c_stride : c_stride(args.n1 - args.n0);
  // Unrolled, as every loop over accumulators has to be: an index that varies would keep them in memory.
  KT_UNROLL for (int t = 0; t < kTokens; ++t) {
    float sums[kRows];
    Product::sums(args, m + static_cast<uint32_t>(t), acc[t], sums);
    float* c = args.c + (m + t) * ld + (b.n - args.n0);
    const float* scale = args.w.channel_scale ? args.w.channel_scale + b.n : nullptr;
    for (int r = 0; r < kRows; ++r) {
      if (scale) {
        c[r] = scale[r] * sums[r];
      } else {
        c[r] = args.accumulate ? c[r] + sums[r] : sums[r];
      }
    }
  }
}

// The widest tile that leaves no narrow one behind: 4 = 2 + 2 rather than 3 + 1.
KT_INLINE uint32_t next_token_tile(uint32_t left) {
  constexpr uint32_t kTile = Vec::kTokenTile;
  if (left <= kTile) return left;
  return left == kTile + 1 && kTile > 2 ? 2 : kTile;
}

// All activation rows pass a block of a group of weight rows. While they do, the weights behind are
// prefetched for, so that the next group finds them on their way from memory.
template <class Product, int kRows, class Weights>
void dot_block(const NtArgs& args, const GroupBlock& b, const Weights& w, Ahead ahead) {
  constexpr int kTwo = Vec::kTokenTile > 1 ? 2 : 1;  // of a tile for one token, 2 is never met
  const size_t prefetched_by_tile = (b.k1 - b.k0) / Product::kStep * ahead.step;
  for (uint32_t m = 0; m < args.x.rows;) {
    const uint32_t tokens = next_token_tile(args.x.rows - m);
    if (tokens == 1)
      dot_tile<Product, kRows, 1>(args, b, w, m, ahead);
    else if (tokens == 2)
      dot_tile<Product, kRows, kTwo>(args, b, w, m, ahead);
    else
      dot_tile<Product, kRows, Vec::kTokenTile>(args, b, w, m, ahead);
    m += tokens;
    const size_t prefetched = prefetched_by_tile < ahead.bytes ? prefetched_by_tile : ahead.bytes;
    ahead.data += prefetched, ahead.bytes -= prefetched;
  }
}

// A block of a group, its weights in place or packed. Each tile of activations prefetches its part of the
// bytes behind, as slowly as possible: requests in a burst wait for each other.
template <class Format, class Product, int kRows>
void dot_block(const NtArgs& args, const GroupBlock& b, bool use_packed, const std::byte* behind,
               size_t bytes) {
  // What a step takes of a group, in whole cache lines.
  constexpr int kStepBytes = static_cast<int>(
      round_up(div_up(Vec::kRowTile * Format::row_bytes(4096) * Product::kStep, size_t{4096}), kCacheLine));
  [[maybe_unused]] constexpr int kLines = kStepBytes / static_cast<int>(kCacheLine);
  const size_t tiles = div_up(args.x.rows, Vec::kTokenTile);
  const auto prefetching = [&](size_t share) { return Ahead{behind, bytes, kStepBytes / share}; };
  if (use_packed) {
    pack_weights<Format, Product, kRows>(args.w, b.n, b.k0, b.k1, args.scratch);
    const PackedWeights<Product, kRows> packed{args.scratch, b.k0};
    const size_t share = tiles == 1 ? 1 : tiles <= 3 ? 2 : tiles < 8 ? 4 : tiles < 16 ? 8 : 16;
    return dot_block<Product, kRows>(args, b, packed, prefetching(share));
  }
  if constexpr (kRows > 1 && !std::is_same_v<Format, AnyBlockFormat>) {  // which are always packed
    if (tiles == 1)
      return dot_block<Product, kRows>(args, b, InPlace<Format, Product, kRows, kLines>(args.w, b.n),
                                       prefetching(1));
  }
  if constexpr (kRows > 1 && Product::template as_stored<Format>()) {  // else more tiles use packed weights
    constexpr int kHalf = (kLines + 1) / 2, kQuarter = (kLines + 3) / 4;
    if (tiles <= 3)
      return dot_block<Product, kRows>(args, b, InPlace<Format, Product, kRows, kHalf>(args.w, b.n),
                                       prefetching(2));
    dot_block<Product, kRows>(args, b, InPlace<Format, Product, kRows, kQuarter>(args.w, b.n),
                              prefetching(4));
  }
}

template <class Format, class Product, int kRows>
void dot_group(const NtArgs& args, uint32_t n, bool use_packed) {
  const uint32_t k = args.x.k;
  const size_t row_bytes = format_row_bytes(args.w.format, k);
  const bool rows_adjoin = args.w.row_stride_bytes == static_cast<ptrdiff_t>(row_bytes);
  const size_t block_k = (use_packed ? kPackedBlockBytes : kBlockBytes) / Product::kElementBytes;
  const size_t num_blocks = k == 0 ? 1 : div_up(k, block_k);
  // Whole steps, and whole runs of AnyBlockFormat.
  const size_t block = round_up(div_up(k, num_blocks), Product::kStep < 32 ? 32 : Product::kStep);
  const size_t prefetch = rows_adjoin ? kRows * row_bytes / num_blocks : 0;
  for (size_t i = 0; i < num_blocks; ++i) {
    const size_t k0 = i * block, k1 = k0 + block < k ? k0 + block : k;
    const GroupBlock b{n, k0, k1, args.scratch + kPackedWeightsBytes};
    dot_block<Format, Product, kRows>(args, b, use_packed, args.w.row(n + kRows) + i * prefetch, prefetch);
  }
}

template <class Format, class Product>
void nt_rows(const NtArgs& args) {
  // What has to be decoded is decoded once.
  constexpr uint32_t kFrom = std::is_same_v<Format, AnyBlockFormat>  ? 1
                             : Product::template as_stored<Format>() ? kPackFromRows
                                                                     : Vec::kTokenTile + 1;
  const bool use_packed = args.x.rows >= kFrom;
  uint32_t n = args.n0;
  for (; n + Vec::kRowTile <= args.n1; n += Vec::kRowTile)
    dot_group<Format, Product, Vec::kRowTile>(args, n, use_packed);
  for (; n < args.n1; ++n) dot_group<Format, Product, 1>(args, n, true);  // few, so one way will do
}
