// Products of encoded weights with few rows of activations in int8 (contract_int8.h), weights in place.
//
// Eight weight rows at a time: each has a vector of partial sums of a group, and adding the eight vectors
// while they are transposed gives the sums of the group as one vector, to which scales are applied.
//
//   codes of row 0 . x -> [. . . . . . . .]  |
//   codes of row 1 . x -> [. . . . . . . .]  | transposed, added -> [S0 S1 .. S7] -> acc
//   ...                                     /
//
// Included inside a target's namespace, after integers-inl.h.

// Up to this many rows of activations share the decoding.
inline constexpr uint32_t kFewRows = 4;
// Up to this many, decoding for every kFewRows of them costs less than panels; sums of small groups cost
// more.
template <class Format>
inline constexpr uint32_t kInPlaceUpTo = Integers<Format>::kGroup >= 128 ? 2 * kFewRows : kFewRows;

// Groups [0, groups) of the block of activations that starts with value k of `x` and with value `at` of the
// weights.
template <class Format, int kTokens>
class GroupSums {
  using Of = Integers<Format>;
  static constexpr size_t kGroup = Of::kGroup;

 public:
  KT_INLINE GroupSums(const EightRows& rows, size_t at, const BlockRow* x, size_t k)
      : rows_(rows), at_(at), x_(x), k_(k), scales_(Of::open(rows, at / kGroup)) {}

  KT_INLINE void add(size_t groups, Floats8 (&acc)[kTokens]) const {
    if constexpr (Of::kHasTwo) {
      constexpr size_t kGroups = kGroup < 64 ? 64 / kGroup : 1;
      for (size_t g = 0; g < groups; g += kGroups) add_two(g, groups, acc);
    } else {
      constexpr size_t kGroups = kGroup < 32 ? 32 / kGroup : 1;
      for (size_t g = 0; g < groups; g += kGroups) add_some(g, groups, acc);
    }
  }

 private:
  // The groups from g on that lie in 32 values, or one that has more.
  KT_INLINE void add_some(size_t g, size_t groups, Floats8 (&acc)[kTokens]) const {
    constexpr size_t kSteps = kGroup < 32 ? 1 : kGroup / 32;
    Ints8 sums[kTokens][8];
    KT_UNROLL for (int r = 0; r < 8; ++r) {
      KT_UNROLL for (size_t s = 0; s < kSteps; ++s) {
        const size_t value = g * kGroup + 32 * s;
        const Bytes32 codes = Of::codes(rows_, r, at_ + value);
        KT_UNROLL for (int t = 0; t < kTokens; ++t) {
          const Ints8 before = s == 0 ? zero_ints() : sums[t][r];
          sums[t][r] = dot_quads<Of::kNarrow>(before, codes, load_32(x_[t].codes + k_ + value));
        }
      }
    }
    KT_UNROLL for (int t = 0; t < kTokens; ++t) {
      if constexpr (kGroup == 16) {
        Ints8 low, high;
        sums_of_halves(sums[t], low, high);
        add_group(g, t, low, acc[t]);
        if (g + 1 < groups) add_group(g + 1, t, high, acc[t]);
      } else {
        add_group(g, t, sums_of_eight(sums[t]), acc[t]);
      }
    }
  }

  // Those in twice as many.
  KT_INLINE void add_two(size_t g, size_t groups, Floats8 (&acc)[kTokens]) const {
    constexpr size_t kSteps = kGroup < 64 ? 1 : kGroup / 64;
    Ints8 sums[kTokens][8];
    KT_UNROLL for (size_t s = 0; s < kSteps; ++s) {
      const size_t value = g * kGroup + 64 * s;
      // Behind the last group nothing has to be.
      const size_t second = kGroup == 32 && g + 1 == groups ? value : value + 32;
      Bytes32 x[kTokens][2];
      KT_UNROLL for (int t = 0; t < kTokens; ++t) {
        const std::byte* codes = x_[t].codes + k_ + value;
        Of::order_two(load_32(codes), load_32(codes + 32), x[t]);
      }
      KT_UNROLL for (int r = 0; r < 8; ++r) {
        Bytes32 codes[2];
        Of::two(rows_, r, at_ + value, at_ + second, codes);
        KT_UNROLL for (int t = 0; t < kTokens; ++t) {
          const Ints8 before = s == 0 ? zero_ints() : sums[t][r];
          sums[t][r] =
              dot_quads<Of::kNarrow>(dot_quads<Of::kNarrow>(before, codes[0], x[t][0]), codes[1], x[t][1]);
        }
      }
    }
    KT_UNROLL for (int t = 0; t < kTokens; ++t) {
      if constexpr (kGroup == 16) {
        Ints8 of_groups[4];
        sums_of_quarters(sums[t], of_groups);
        KT_UNROLL for (size_t i = 0; i < 4; ++i) if (g + i < groups)
            add_group(g + i, t, of_groups[i], acc[t]);
      } else if constexpr (kGroup == 32) {
        Ints8 low, high;
        sums_of_halves(sums[t], low, high);
        add_group(g, t, low, acc[t]);
        if (g + 1 < groups) add_group(g + 1, t, high, acc[t]);
      } else {
        add_group(g, t, sums_of_eight(sums[t]), acc[t]);
      }
    }
  }

  KT_INLINE void add_group(size_t g, int t, Ints8 sums, Floats8& acc) const {
    const size_t block = k_ / Of::kBlock;
    int32_t sum_of_x = 0;
    if constexpr (kQuadBias<Of> != 0 || Of::kHasOffset) {
      const int16_t* of_x = x_[t].sums16 + (k_ + g * kGroup) / 16;
      for (size_t i = 0; i < kGroup / 16; ++i) sum_of_x += of_x[i];
    }
    if constexpr (kQuadBias<Of> != 0) sums = minus_ints(sums, set_ints(kQuadBias<Of> * sum_of_x));
    const Floats8 scale_of_x = set_8(x_[t].scales[block]);
    acc = fma_8(mul_8(scales_.scale(g), scale_of_x), floats_of(sums), acc);
    if constexpr (Of::kHasOffset) {
      const Floats8 offset = mul_8(Of::offsets(rows_, at_ / kGroup + g), scale_of_x);
      acc = fma_8(offset, set_8(static_cast<float>(sum_of_x)), acc);
    }
  }

  const EightRows& rows_;
  const size_t at_;
  const BlockRow* x_;
  const size_t k_;
  const decltype(Of::open(rows_, 0)) scales_;
};

// Whether factors are taken to sums of quads of wide codes: cheaper than pairs, which would take their signs.
template <class Of>
inline constexpr bool kFactorsQuads = !Of::kNarrow && kDotsWideCodes;

// The sums of codes times factors of a row's block: groups one by one, or two by two where that is cheaper.
template <class Format, int kTokens>
class FactoredSums {
  using Of = Integers<Format>;
  static constexpr size_t kGroups = Format::kGroups;
  static constexpr bool kInPairs = Of::kHasTwo && kFactorsQuads<Of>;

 public:
  KT_INLINE FactoredSums(const BlockRow* x, size_t k) : x_(x), k_(k) {
    if constexpr (kInPairs) {
      KT_UNROLL for (int t = 0; t < kTokens; ++t) KT_UNROLL for (size_t pair = 0; pair < 4; ++pair)
          Of::order_two(of_x(t, 2 * pair), of_x(t, 2 * pair + 1), pairs_[t][pair]);
    }
  }

  KT_INLINE void add(const EightRows& rows, int r, const formats::GroupNumbers& numbers,
                     Ints8 (&sum)[kTokens]) const {
    if constexpr (kInPairs) {
      const Ints8 factors = eight_ints(numbers.scale[0]);
      KT_UNROLL for (size_t pair = 0; pair < 4; ++pair) {
        Bytes32 codes[2];
        Of::two(rows, r, k_ + 64 * pair, 0, codes);
        const Ints8 factor = spread_two_ints(factors, 2 * pair);
        KT_UNROLL for (int t = 0; t < kTokens; ++t) {
          const Ints8 first = dot_quads<false>(zero_ints(), codes[0], pairs_[t][pair][0]);
          sum[t] = add_products(sum[t], dot_quads<false>(first, codes[1], pairs_[t][pair][1]), factor);
        }
      }
    } else {
      const Words16 factors = words_to_spread<kGroups>(numbers.scale);
      KT_UNROLL for (size_t g = 0; g < 8; ++g) {
        const Bytes32 codes = Of::codes(rows, r, k_ + 32 * g);
        KT_UNROLL for (int t = 0; t < kTokens; ++t) {
          if constexpr (kFactorsQuads<Of>) {
            static_assert(kGroups == 8);
            const Ints8 quads = dot_quads<false>(zero_ints(), codes, of_x(t, g));
            sum[t] = add_products(sum[t], quads, spread_int(numbers.scale[0], g));
          } else {
            sum[t] = dot_words(sum[t], dot_pairs<Of::kNarrow>(codes, of_x(t, g)), spread_group(factors, g));
          }
        }
      }
    }
  }

 private:
  KT_INLINE Bytes32 of_x(int t, size_t g) const { return load_32(x_[t].codes + k_ + 32 * g); }

  const BlockRow* x_;
  const size_t k_;
  Bytes32 pairs_[kInPairs ? kTokens : 1][4][2];
};

// The block of 256 values from k on, whose groups have integer factors.
template <class Format, int kTokens>
KT_INLINE void add_factored_block(const EightRows& rows, const BlockRow* x, size_t k,
                                  Floats8 (&acc)[kTokens]) {
  using Of = Integers<Format>;
  constexpr size_t kGroups = Format::kGroups;
  const auto sums_of_x = [&](int t) {
    return load_sums<kGroups>(kGroups == 16 ? x[t].sums16 + k / 16 : x[t].sums32 + k / 32);
  };
  Ints8 sums[kTokens][8], offsets[kTokens][8];
  const FactoredSums<Format, kTokens> factored(x, k);
  KT_NO_UNROLL for (int r = 0; r < 8; ++r) {
    formats::GroupNumbers numbers;
    Format::group_numbers(Of::block(rows.row(r), k), numbers);
    Ints8 sum[kTokens];
    KT_UNROLL for (int t = 0; t < kTokens; ++t) sum[t] = zero_ints();
    factored.add(rows, r, numbers, sum);
    KT_UNROLL for (int t = 0; t < kTokens; ++t) {
      constexpr int kBias = kFactorsQuads<Of> ? Of::kBias : kPairBias<Of>;
      if constexpr (kBias != 0) {
        const Ints8 of_x = dot_words(zero_ints(), group_words<kGroups>(numbers.scale), sums_of_x(t));
        sum[t] = minus_ints(sum[t], shift_left<std::countr_zero(static_cast<unsigned>(kBias))>(of_x));
      }
      sums[t][r] = sum[t];
      if constexpr (Of::kHasOffset)
        offsets[t][r] = dot_words(zero_ints(), group_words<kGroups>(numbers.offset), sums_of_x(t));
    }
  }
  const Floats8 scale = Of::open(rows, k / 256).scale(0);
  KT_UNROLL for (int t = 0; t < kTokens; ++t) {
    const Floats8 of_x = set_8(x[t].scales[k / 256]);
    acc[t] = fma_8(mul_8(scale, of_x), floats_of(sums_of_eight(sums[t])), acc[t]);
    if constexpr (Of::kHasOffset) {
      const Floats8 minus = mul_8(Of::offsets(rows, k / 256), set_8(-x[t].scales[k / 256]));
      acc[t] = fma_8(minus, floats_of(sums_of_eight(offsets[t])), acc[t]);
    }
  }
}

// Eight outputs of kTokens rows of activations. Meanwhile the eight rows `next` are prefetched.
template <class Format, int kTokens>
KT_INLINE void dot_eight(const EightRows& rows, const EightRows& next, const BlockRow* x, size_t k,
                         Floats8 (&acc)[kTokens]) {
  using Of = Integers<Format>;
  constexpr size_t kBlock = Of::kBlock;
  KT_UNROLL for (int t = 0; t < kTokens; ++t) acc[t] = set_8(0.0f);
  size_t at = 0;
  const size_t whole = BlockFormat<Format> ? k : k / kBlock * kBlock;
  for (; at < whole; at += kBlock) {
    prefetch_block<Format>(next, at);
    if constexpr (Of::kHasFactors) {
      add_factored_block<Format>(rows, x, at, acc);
    } else {
      const size_t left = div_up(k - at, Of::kGroup);
      const size_t groups = left < kBlock / Of::kGroup ? left : kBlock / Of::kGroup;
      GroupSums<Format, kTokens>(rows, at, x, at).add(groups, acc);
    }
  }
  if constexpr (!BlockFormat<Format>) {
    if (at < k) {
      RestOfRows<Format> rest;
      rest.copy(rows, at, k);
      GroupSums<Format, kTokens>(rest.rows, 0, x, at).add(div_up(k - at, Of::kGroup), acc);
    }
  }
}

// Rows [m, m + kTokens) of the activations, or those that are left.
template <class Format, int kTokens>
void int8_few_rows(const NtArgs& args, uint32_t m) {
  const BlockRowLayout layout(args.x.k, Integers<Format>::kBlock);
  const uint32_t left = args.x.rows - m, count = left < kTokens ? left : kTokens;
  BlockRow x[kTokens];
  for (uint32_t t = 0; t < kTokens; ++t) x[t] = block_row(args, m + (t < count ? t : count - 1), layout);
  for (uint32_t n = args.n0; n < args.n1;) {
    const EightOutputs outputs = next_eight<Format>(args, n);
    EightRows next = outputs.rows.behind(8);
    if (n + 8 >= args.n1 && args.next_rows != nullptr) next.data = args.next_rows;
    Floats8 acc[kTokens];
    dot_eight<Format, kTokens>(outputs.rows, next, x, args.x.k, acc);
    for (uint32_t t = 0; t < count; ++t)
      store_outputs(args, m + t, n, outputs.first, outputs.count,
                    with_channel_scale<Format>(outputs.rows, acc[t]));
    n += outputs.count;
  }
}
