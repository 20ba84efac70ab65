// NN of tile targets for a few rows of G, on vectors: rows of W are multiplied directly from memory, not
// interleaved first. Every output takes the steps that the tile unit takes (policy/tile_sums_*.h), so it has
// the same bits: over 32 rows of W, the even and the odd ones are summed separately from zero, the two sums
// added, and that is added to C. Included inside a target's namespace, after nn-inl.h.
//
// The lhs operand is the rows of G in place.

// Up to here memory is the bottleneck.
inline constexpr uint32_t kFewRows = 12;
// Rows of G at a time: 24 accumulators of 32 registers.
inline constexpr int kFewRowsTile = 6;
// Columns at a time: even ones in one vector, odd ones in another.
inline constexpr uint32_t kFewColumns = 2 * Vec::kWidth;

// The rows of W of the next step, prefetched row after row while one is multiplied: memory is read best in
// long pieces.
struct RowsAhead {
  const std::byte* row[kPairsStep];
  uint32_t num_rows = 0;
  size_t row_bytes = 0;

  KT_INLINE void restart() { next_ = 0, at_ = 0; }
  KT_INLINE void prefetch() {
    if (next_ >= num_rows) return;
    __builtin_prefetch(row[next_] + at_, 0, 2);
    at_ += kCacheLine;
    if (at_ >= row_bytes) at_ = 0, ++next_;
  }

 private:
  uint32_t next_ = 0;
  size_t at_ = 0;
};

// Rows of W that a step sums over, from column k0 on, and what they are multiplied by.
struct FewRowsStep {
  const std::byte* row[kPairsStep];
  alignas(kCacheLine) float g[kFewRows][kPairsStep];
  RowsAhead ahead;
};

// C of a call in lanes: [groups of kFewColumns][rows][even columns, odd columns].
KT_INLINE float* few_lanes(float* c, uint32_t group, uint32_t rows, uint32_t row) {
  return c + (size_t{group} * rows + row) * kFewColumns;
}

// kRows rows of G by a group of columns, `at` bytes into the rows of W.
template <int kRows>
KT_INLINE void few_rows_tile(FewRowsStep& s, uint32_t first, size_t at, float* c) {
  Float even[kRows][2], odd[kRows][2];
  for (int r = 0; r < kRows; ++r) even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = Vec::set(0.0f);
  for (uint32_t n = 0; n < kPairsStep; n += 2) {
    s.ahead.prefetch();
    s.ahead.prefetch();
    const Float low = Vec::load_even(s.row[n] + at), high = Vec::load_odd(s.row[n] + at);
    KT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Float g = Vec::set(s.g[first + r][n]);
      even[r][0] = TileSums::fused(g, low, even[r][0]);
      even[r][1] = TileSums::fused(g, high, even[r][1]);
    }
    const Float low1 = Vec::load_even(s.row[n + 1] + at), high1 = Vec::load_odd(s.row[n + 1] + at);
    KT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Float g = Vec::set(s.g[first + r][n + 1]);
      odd[r][0] = TileSums::fused(g, low1, odd[r][0]);
      odd[r][1] = TileSums::fused(g, high1, odd[r][1]);
    }
  }
  KT_UNROLL for (int r = 0; r < kRows; ++r) {
    for (uint32_t half = 0; half < 2; ++half) {
      float* lanes = c + r * kFewColumns + half * Vec::kWidth;
      Vec::store_f(lanes, TileSums::added(Vec::load_f(lanes), TileSums::added(even[r][half], odd[r][half])));
    }
  }
}

template <int kRows>
KT_INLINE void few_rows_tiles(FewRowsStep& s, uint32_t first, uint32_t rows, size_t at, float* c) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return few_rows_tile<kRows>(s, first, at, c);
    few_rows_tiles<kRows - 1>(s, first, rows, at, c);
  }
}

// All rows of G by a group of columns.
KT_INLINE void few_rows_group(FewRowsStep& s, uint32_t rows, size_t at, float* c) {
  for (uint32_t r = 0; r < rows; r += kFewRowsTile)
    few_rows_tiles<kFewRowsTile>(s, r, smaller(rows - r, kFewRowsTile), at, c + r * kFewColumns);
}

class FewRows {
 public:
  KT_INLINE explicit FewRows(const NnArgs& args)
      : args_(args),
        rows_(args.terms[0].g.rows),
        columns_{args.k0, args.k1, nullptr},
        groups_(static_cast<uint32_t>(div_up(columns_.size(), kFewColumns))),
        c_(reinterpret_cast<float*>(args.scratch)),
        copies_(args.scratch + sizeof(float) * kFewRows * kMaxColumns) {}

  void run() {
    for (size_t i = 0; i < args_.terms.size(); ++i)
      for (uint32_t s0 = 0; s0 < args_.terms[i].size(); s0 += kPairsStep) step(i, s0);
  }

  void load_c() {
    std::memset(c_, 0, size_t{groups_} * rows_ * kFewColumns * sizeof(float));
    if (args_.accumulate) each([](float& lane, float& c) { lane = c; });
  }
  void store_c() {
    each([](float& lane, float& c) { c = lane; });
  }

 private:
  static constexpr uint32_t kMaxColumns = kMaxNnColumns + kFewColumns;
  // Of a row of W; no two rows begin in the same set of the cache.
  static constexpr uint32_t kCopyColumns = 256;
  static constexpr size_t kCopyBytes = kCopyColumns * sizeof(bf16) + kCacheLine;

  template <class Function>
  KT_INLINE void each(Function function) {
    for (uint32_t m = 0; m < rows_; ++m) {
      float* row = args_.c + m * args_.c_stride;
      for (uint32_t k = 0; k < columns_.size(); ++k) {
        const uint32_t in_group = k % kFewColumns;
        float* lanes = few_lanes(c_, k / kFewColumns, rows_, m);
        function(lanes[in_group % 2 * Vec::kWidth + in_group / 2], row[k]);
      }
    }
  }

  // Prefetches the rows behind [.., s0) of term i: its own, those of the next term, or the next rows of the
  // caller.
  KT_INLINE void look_ahead(size_t i, uint32_t s0) {
    if (s0 >= args_.terms[i].size()) ++i, s0 = 0;
    if (i < args_.terms.size()) {
      const NnTerm& term = args_.terms[i];
      ask_for(term.w, s0, term.size(), columns_);
    } else {
      const bool any = args_.next_w.data != nullptr;
      ask_for(args_.next_w, 0, any ? args_.next_n : 0, {args_.next_k0, args_.next_k1, nullptr});
    }
  }
  KT_INLINE void ask_for(const WeightView& w, uint32_t s0, uint32_t end, const WeightColumns& columns) {
    RowsAhead& ahead = step_.ahead;
    ahead.num_rows = smaller(end - s0, kPairsStep);
    for (uint32_t n = 0; n < ahead.num_rows; ++n) ahead.row[n] = columns.begin(w, s0 + n);
    ahead.row_bytes = columns.bytes(w);
    ahead.restart();
  }

  // Rows [s0, s0 + 32) of term i; zeros behind its last.
  KT_INLINE void step(size_t i, uint32_t s0) {
    const NnTerm& term = args_.terms[i];
    look_ahead(i, s0 + kPairsStep);
    const uint32_t count = smaller(term.size() - s0, kPairsStep);
    for (uint32_t m = 0; m < rows_; ++m) {
      const size_t row = term.g.index ? term.g.index[m] : m;
      const std::byte* from = term.g.data + row * term.g.stride_bytes + (term.n0 + s0) * sizeof(bf16);
      bf16 g[kPairsStep] = {};
      std::memcpy(g, from, count * sizeof(bf16));
      for (uint32_t n = 0; n < kPairsStep; n += Vec::kWidth)
        Vec::store_f(step_.g[m] + n, Vec::load_bf16(g + n));
    }
    if (!columns_.is_stored(term.w)) return decoded_step(term, s0, count);
    for (uint32_t n = 0; n < kPairsStep; ++n)
      step_.row[n] = n < count ? columns_.begin(term.w, s0 + n) : kZeroRow;
    const uint32_t whole = columns_.size() / kFewColumns;
    groups(0, whole, 0);
    if (whole < groups_) last_group(whole * kFewColumns);
  }
  // Groups [begin, end) of columns; rows begin with column `first`. Products flush denormals, decoding does
  // not.
  void groups(uint32_t begin, uint32_t end, uint32_t first) {
    const TileSums::FlushDenormals flush;
    multiply(begin, end, first);
  }
  // Not inlined, so that nothing of it is moved out of the caller's FlushDenormals.
  __attribute__((noinline)) void multiply(uint32_t begin, uint32_t end, uint32_t first) {
    for (uint32_t j = begin; j < end; ++j)
      few_rows_group(step_, rows_, (j * kFewColumns - first) * sizeof(bf16), few_lanes(c_, j, rows_, 0));
  }

  // The same of rows that are decoded, as many columns at a time as stay in the L1 cache.
  KT_INLINE void decoded_step(const NnTerm& term, uint32_t s0, uint32_t count) {
    for (uint32_t n = 0; n < kPairsStep; ++n) step_.row[n] = n < count ? copies_ + n * kCopyBytes : kZeroRow;
    for (uint32_t k = 0; k < columns_.size(); k += kCopyColumns) {
      const uint32_t end = smaller(k + kCopyColumns, columns_.size());
      const WeightColumns some{columns_.k0 + k, columns_.k0 + end, nullptr};
      for (uint32_t n = 0; n < count; ++n) some.decode(term.w, s0 + n, copies_ + n * kCopyBytes);
      groups(k / kFewColumns, static_cast<uint32_t>(div_up(end, kFewColumns)), k);
    }
  }

  // Fewer columns than a group: rows continue with zeros.
  void last_group(uint32_t k) {
    const uint32_t bytes = (columns_.size() - k) * sizeof(bf16);
    for (uint32_t n = 0; n < kPairsStep; ++n) {
      std::byte* copy = copies_ + n * kCopyBytes;
      std::memset(copy, 0, kFewColumns * sizeof(bf16));
      std::memcpy(copy, step_.row[n] + k * sizeof(bf16), bytes);
      step_.row[n] = copy;
    }
    groups(k / kFewColumns, k / kFewColumns + 1, k);
  }

  const NnArgs& args_;
  const uint32_t rows_;
  const WeightColumns columns_;
  const uint32_t groups_;
  float* const c_;
  std::byte* const copies_;
  FewRowsStep step_;
};

inline void nn_few_rows(const NnArgs& args) {
  FewRows product(args);
  product.load_c();
  product.run();
  product.store_c();
}
