// Rows of weights to int4: the search for a row's scale and its groups' multipliers that the reference
// (quantize_int4) states step by step. Groups are searched several at a time: their multipliers stand side by
// side in vectors, their sums of squares are reduced together.
// Included inside a target's namespace, after quantize-inl.h.

// Nearest code to t, from -8 to 7.
KT_INLINE Float nearest_int4(const Float& t) {
  return Vec::clamp_above(Vec::clamp_below(Vec::round(t), Vec::set(-8.0f)), Vec::set(7.0f));
}

// The sum over a group of (v r - its nearest code)^2, but for the reduction.
template <size_t kGroup>
KT_INLINE Float squares_of_errors(const float* v, const Float& r) {
  LaneSum sum;
  for (size_t i = 0; i < kGroup; i += kSumLanes) {
    KT_UNROLL
    for (size_t p = 0; p < kSumVectors; ++p) {
      const Float t = Vec::mul(Vec::load_f(v + i + p * Vec::kWidth), r);
      const Float error = Vec::sub(t, nearest_int4(t)), square = Vec::mul(error, error);
      sum.part[p] = i == 0 ? square : Vec::add(sum.part[p], square);
    }
  }
  return sum.halves();
}

// Each group's multiplier is sought among kOffsets candidates, for each of kTries scales of the row.
constexpr size_t kTries = 2, kOffsets = 4, kGroupsAtOnce = 16;

// Some groups of a row during the search.
template <size_t kGroup>
struct GroupSearch {
  using PerGroup = float[kGroupsAtOnce];
  alignas(64) float v[kGroupsAtOnce * kGroup];
  alignas(64) PerGroup high = {}, low = {};
  alignas(64) PerGroup m[kTries * kOffsets] = {}, reciprocal[kTries * kOffsets] = {};
  alignas(64) PerGroup error[kTries * kOffsets] = {};
  alignas(64) PerGroup best[kTries] = {};
  int8_t chosen[kTries][kGroupsAtOnce];
  size_t padded = 0;  // groups, to whole reductions

  // Columns from `first` on times `power`, in whole groups filled up with zeros.
  template <class T>
  KT_INLINE void load(const WeightRow<T>& row, size_t first, size_t groups, float power) {
    padded = round_up(groups, Vec::kRowTile);
    const Float factor = Vec::set(power), zero = Vec::set(0.0f);
    for (size_t i = 0; i < padded * kGroup; i += Vec::kWidth) {
      const bool inside = first + i < row.k;
      Vec::store_f(v + i, inside ? Vec::mul(row.load(first + i), factor) : zero);
    }
    for (size_t g = 0; g < padded; ++g) {
      Float most = Vec::load_f(v + g * kGroup), least = most;
      for (size_t i = Vec::kWidth; i < kGroup; i += Vec::kWidth) {
        const Float x = Vec::load_f(v + g * kGroup + i);
        most = Vec::clamp_below(most, x), least = Vec::clamp_above(least, x);
      }
      high[g] = Vec::largest(most), low[g] = Vec::largest(Vec::sub(zero, least));
    }
  }

  // m and 1 / (s m) of all candidates. The largest of a group goes to -8, not to 7.
  KT_INLINE void propose(const float (&s)[kTries]) {
    const Float one = Vec::set(1.0f), most = Vec::set(15.0f);
    for (size_t g = 0; g < padded; g += Vec::kWidth) {
      const Float up = Vec::load_f(high + g), down = Vec::load_f(low + g);
      const Float sign = Vec::select(Vec::less(down, up), Vec::set(-1.0f), one);
      const Float extreme = Vec::clamp_below(up, down);
      for (size_t t = 0; t < kTries; ++t) {
        const Float scale = Vec::set(s[t]);
        const Float middle = Vec::round(Vec::div(extreme, Vec::set(s[t] * 8.25f)));
        for (size_t o = 0; o < kOffsets; ++o) {
          const Float near = Vec::add(middle, Vec::set(static_cast<float>(o) - 1.0f));
          const Float with_sign = Vec::mul(sign, Vec::clamp_above(Vec::clamp_below(near, one), most));
          Vec::store_f(m[t * kOffsets + o] + g, with_sign);
          Vec::store_f(reciprocal[t * kOffsets + o] + g, Vec::div(one, Vec::mul(scale, with_sign)));
        }
      }
    }
  }

  KT_INLINE void measure() {
    for (size_t g = 0; g < padded; g += Vec::kRowTile) {
      for (size_t c = 0; c < kTries * kOffsets; ++c) {
        Vec::Acc sums[Vec::kRowTile];
        KT_UNROLL
        for (size_t i = 0; i < static_cast<size_t>(Vec::kRowTile); ++i)
          sums[i] = squares_of_errors<kGroup>(v + (g + i) * kGroup, Vec::set(reciprocal[c][g + i]));
        Vec::reduce(sums, error[c] + g);
      }
    }
  }

  // Of candidates with the same error the first.
  KT_INLINE void choose() {
    for (size_t g = 0; g < padded; g += Vec::kWidth) {
      for (size_t t = 0; t < kTries; ++t) {
        Float least = Vec::set(std::numeric_limits<float>::infinity()), choice = Vec::set(1.0f);
        for (size_t c = t * kOffsets; c < (t + 1) * kOffsets; ++c) {
          const Float multiplier = Vec::load_f(m[c] + g);
          const Float size = Vec::mul(Vec::load_f(error[c] + g), Vec::mul(multiplier, multiplier));
          const Vec::Mask better = Vec::less(size, least);
          least = Vec::select(better, size, least), choice = Vec::select(better, multiplier, choice);
        }
        Vec::store_f(best[t] + g, least);
        Vec::store_int8(chosen[t] + g, choice);
      }
    }
  }
};

// A row while it is quantized: v = w power, with amax of v in [2, 4) unless amax is denormal.
template <class T, size_t kGroup>
struct Int4Row {
  WeightRow<T> row;
  std::byte* codes;
  size_t groups;
  float power;

  KT_INLINE std::byte* multipliers() const { return codes + (row.k + 1) / 2; }
  // Where the second choice of group g waits: its codes are not written yet.
  KT_INLINE std::byte* second_choice(size_t g) const { return codes + g * (kGroup / 2); }

  void write_zeros() const {
    std::memset(codes, 0, (row.k + 1) / 2);
    std::memset(multipliers(), 1, groups);
  }

  // The largest power of two that divides every rint(32 v), over 32.
  float common_power() const {
    const Float factor = Vec::set(power), steps = Vec::set(32.0f);
    Vec::Bits joined = Vec::zero_bits();
    for (size_t at = 0; at < row.k; at += Vec::kWidth)
      joined = Vec::join_whole(joined, Vec::round(Vec::mul(Vec::mul(row.load(at), factor), steps)));
    const uint32_t every = Vec::join(joined), lowest = every & (~every + 1);
    return static_cast<float>(lowest ? lowest : 1) / 32.0f;
  }

  // Which of the scales has the smaller error; leaves the multipliers of both.
  size_t search(const float (&s)[kTries]) const {
    GroupSearch<kGroup> some;
    float total[kTries] = {};
    for (size_t first = 0; first < groups; first += kGroupsAtOnce) {
      const size_t count = groups - first < kGroupsAtOnce ? groups - first : kGroupsAtOnce;
      some.load(row, first * kGroup, count, power);
      some.propose(s);
      some.measure();
      some.choose();
      std::memcpy(multipliers() + first, some.chosen[0], count);
      for (size_t g = 0; g < count; ++g) {
        std::memcpy(second_choice(first + g), &some.chosen[1][g], 1);
        total[0] += some.best[0][g];
        total[1] += some.best[1][g];
      }
    }
    return (s[1] * s[1]) * total[1] < (s[0] * s[0]) * total[0] ? 1 : 0;
  }

  // Writes codes and multipliers for the scale s that was chosen and returns the scale that fits them best.
  float fit(float s, size_t choice) const {
    const Float factor = Vec::set(power), zero = Vec::set(0.0f);
    LaneSum top, bottom;
    KT_UNROLL
    for (size_t p = 0; p < kSumVectors; ++p) top.part[p] = bottom.part[p] = zero;
    Float largest = zero;
    for (size_t g = 0; g < groups; ++g) {
      int8_t m, q[kGroup];
      std::memcpy(&m, choice ? second_choice(g) : multipliers() + g, 1);
      std::memcpy(multipliers() + g, &m, 1);
      const Float multiplier = Vec::set(m), r = Vec::set(1.0f / (s * static_cast<float>(m)));
      for (size_t i = 0; i < kGroup; i += kSumLanes) {
        KT_UNROLL
        for (size_t p = 0; p < kSumVectors; ++p) {
          const size_t in_group = i + p * Vec::kWidth, at = g * kGroup + in_group;
          const Float v = at < row.k ? Vec::mul(row.load(at), factor) : zero;
          const Float code = nearest_int4(Vec::mul(v, r)), c = Vec::mul(multiplier, code);
          Vec::store_int8(q + in_group, code);
          top.part[p] = Vec::add(top.part[p], Vec::mul(v, c));
          bottom.part[p] = Vec::add(bottom.part[p], Vec::mul(c, c));
          largest = Vec::clamp_below(largest, Vec::abs(c));
        }
      }
      store_pairs(g, q);
    }
    const float best = Vec::sum(top.halves()) / Vec::sum(bottom.halves());
    // No decoded weight is larger than the largest bfloat16.
    const float scale = best / power, limit = kLargestBf16 / Vec::largest(largest);
    return scale < limit ? scale : limit;
  }

  KT_INLINE void store_pairs(size_t g, const int8_t* q) const {
    std::byte pairs[kGroup / 2];
    KT_UNROLL
    for (size_t i = 0; i < kGroup / 2; ++i)
      pairs[i] = static_cast<std::byte>((q[2 * i] & 15) | (q[2 * i + 1] << 4));
    const size_t columns = row.k - g * kGroup;
    if (columns >= kGroup) {
      std::memcpy(codes + g * (kGroup / 2), pairs, kGroup / 2);
    } else {
      std::memcpy(codes + g * (kGroup / 2), pairs, (columns + 1) / 2);
    }
  }
};

template <class T, size_t kGroup>
uint32_t quantize_int4_of(const QuantizeArgs& a) {
  for (uint32_t n = 0; n < a.n; ++n) {
    Int4Row<T, kGroup> to{WeightRow<T>::of(a, n), a.codes + n * a.codes_stride, div_up(a.k, kGroup), 1.0f};
    const float amax = to.row.amax(0, a.k);
    if (!is_number(amax)) return n;
    if (amax == 0) {
      to.write_zeros();
      a.channel_scale[n] = 0;
      continue;
    }
    to.power = normalizer(amax);
    const float s[kTries] = {amax * to.power / 128.0f, to.common_power()};
    const size_t choice = to.search(s);
    a.channel_scale[n] = to.fit(s[choice], choice);
  }
  return a.n;
}

template <class T>
uint32_t quantize_int4_in_groups(const QuantizeArgs& a) {
  if (a.group == 32) return quantize_int4_of<T, 32>(a);
  if (a.group == 64) return quantize_int4_of<T, 64>(a);
  return quantize_int4_of<T, 128>(a);
}

inline uint32_t quantize_int4(const QuantizeArgs& a) {
  return a.type == FloatType::kBf16 ? quantize_int4_in_groups<bf16>(a) : quantize_int4_in_groups<float>(a);
}
