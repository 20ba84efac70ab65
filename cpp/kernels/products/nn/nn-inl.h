// NN, common to vectors and tiles: C[m, k - k0] (+)= sum over terms of sum_n G[m, n] W[n, k].
//
// The rows of the terms' weights, each padded to whole steps, are one sequence. It is taken in blocks of
// equal length, whose rows are interleaved in pairs (pairs-inl.h) and multiplied; sums are kept in C
// between blocks. Included inside a target's namespace, after pairs-inl.h.

// Bytes of a packed block. Together with its multiplier it must stay in the L2 cache, and there are two: one
// is multiplied while the other is packed. Blocks are long, as storing and loading the sums in C costs about
// four steps.
inline constexpr size_t kNnPackedBytes = size_t{224} << 10;

// Rows [s0, s1) of a term, which begin `step` steps into their block.
struct NnSlice {
  const NnTerm* term;
  uint32_t s0, s1, step;
};

struct NnBlock {
  static constexpr uint32_t kMaxSlices = 8;
  NnSlice slices[kMaxSlices];
  uint32_t num_slices = 0, num_steps = 0;

  KT_INLINE uint32_t num_pairs() const {
    uint32_t pairs = 0;
    for (uint32_t i = 0; i < num_slices; ++i)
      pairs += static_cast<uint32_t>(div_up(slices[i].s1 - slices[i].s0, 2));
    return pairs;
  }
};

// Cuts the sequence into blocks of at most `most` steps.
class NnBlocks {
 public:
  KT_INLINE NnBlocks(std::span<const NnTerm> terms, uint32_t most) : terms_(terms) {
    size_t steps = 0;
    for (const NnTerm& term : terms) steps += div_up(term.size(), kPairsStep);
    steps_ = static_cast<uint32_t>(div_up(steps, div_up(steps, most)));
  }
  KT_INLINE uint32_t steps() const { return steps_; }

  // The next block, empty behind the last.
  KT_INLINE NnBlock next() {
    NnBlock block;
    while (term_ < terms_.size() && block.num_steps < steps_ && block.num_slices < NnBlock::kMaxSlices) {
      const NnTerm& term = terms_[term_];
      const uint32_t end = smaller(term.size(), row_ + (steps_ - block.num_steps) * kPairsStep);
      block.slices[block.num_slices++] = {&term, row_, end, block.num_steps};
      block.num_steps += static_cast<uint32_t>(div_up(end - row_, kPairsStep));
      row_ = end;
      if (row_ == term.size()) row_ = 0, ++term_;
    }
    return block;
  }

 private:
  std::span<const NnTerm> terms_;
  uint32_t steps_;
  size_t term_ = 0;
  uint32_t row_ = 0;
};

// Columns [k0, k1) of rows of weights. Those that are not bf16 are decoded, into memory for two rows.
struct WeightColumns {
  uint32_t k0, k1;
  std::byte* decoded;

  KT_INLINE uint32_t size() const { return k1 - k0; }
  static KT_INLINE bool is_stored(const WeightView& w) { return w.format == FormatId::kBf16; }
  // Valid until the next row of the same parity is read.
  KT_INLINE const std::byte* of(const NnTerm& term, uint32_t s) const {
    if (is_stored(term.w)) return begin(term.w, s);
    std::byte* to = decoded + s % 2 * (kMaxPackedColumns * sizeof(bf16));
    decode(term.w, s, to);
    return to;
  }
  // Where the columns of a row begin.
  KT_INLINE const std::byte* begin(const WeightView& w, uint32_t s) const { return w.row(s) + offset(w, k0); }
  KT_INLINE void decode(const WeightView& w, uint32_t s, std::byte* to) const {
    kDecodeFunctions[static_cast<size_t>(w.format)](w, s, k0, k1, to);
  }
  // Prefetches what of() reads.
  template <int kHint>
  KT_INLINE void prefetch(const WeightView& w, uint32_t s) const {
    prefetch_bytes<kHint>(begin(w, s), bytes(w));
  }
  // As they are stored.
  KT_INLINE size_t bytes(const WeightView& w) const { return offset(w, k1) - offset(w, k0); }

 private:
  // Of column k in a row, or of the end of its block.
  static KT_INLINE size_t offset(const WeightView& w, uint32_t k) {
    return is_stored(w) ? k * sizeof(bf16) : format_row_bytes(w.format, k);
  }
};
inline constexpr size_t kDecodedBytes = 2 * kMaxPackedColumns * sizeof(bf16);
inline constexpr size_t kNnScratchBytes = 2 * kNnPackedBytes + kDecodedBytes;

// Packs a block, pair by pair.
class BlockFill {
 public:
  KT_INLINE BlockFill(const NnBlock& block, const WeightColumns& columns, const PackedPairs& packed)
      : block_(block), columns_(columns), packed_(packed), pairs_(block.num_pairs()) {
    if (pairs_) row_ = block.slices[0].s0;
  }
  KT_INLINE uint32_t pairs_left() const { return pairs_; }

  KT_INLINE void pair() {
    const NnSlice& slice = block_.slices[slice_];
    const NnTerm& term = *slice.term;
    const uint32_t ahead = row_ + kRowsAhead;
    if (ahead < slice.s1) columns_.prefetch<3>(term.w, ahead);
    if (ahead + 1 < slice.s1) columns_.prefetch<3>(term.w, ahead + 1);
    const std::byte* even = columns_.of(term, row_);
    const std::byte* odd = row_ + 1 < slice.s1 ? columns_.of(term, row_ + 1) : kZeroRow;
    interleave_pair(even, odd, columns_.size(), packed_, at_);
    at_ += kPairsBytes;
    row_ += 2;
    --pairs_;
    if (row_ < slice.s1) return;
    at_ = finish_step(columns_.size(), packed_, at_);
    if (pairs_) row_ = block_.slices[++slice_].s0;
  }
  KT_INLINE void finish() {
    while (pairs_) pair();
  }

 private:
  const NnBlock& block_;
  const WeightColumns& columns_;
  const PackedPairs packed_;
  size_t at_ = 0;  // bytes of a group that are filled
  uint32_t pairs_, slice_ = 0, row_ = 0;
};

// Work done in small parts while a block is multiplied, so that multiplication, interleaving and memory
// accesses overlap. Called by a pointer: products are the same whatever it does.
class WorkAhead {
 public:
  KT_INLINE void spread_over(size_t times) { each_ = static_cast<uint32_t>(div_up(left_, times)); }
  KT_INLINE void advance() {
    if (left_ == 0) return;
    const uint32_t some = smaller(each_, left_);
    left_ -= some;
    work_(*this, some);
  }

 protected:
  using Part = void (*)(WorkAhead& self, uint32_t times);
  KT_INLINE WorkAhead(Part work, uint32_t times) : work_(work), left_(times) {}
  ~WorkAhead() = default;

 private:
  const Part work_;
  uint32_t left_, each_ = 0;
};
struct NothingAhead : WorkAhead {
  NothingAhead() : WorkAhead(nullptr, 0) {}
};

// Packs the next block or, after the last one, prefetches the rows that the caller multiplies next, into the
// L2 cache.
class BlockAhead : public WorkAhead {
 public:
  KT_INLINE BlockAhead(const NnArgs& args, const NnBlock& next, const WeightColumns& columns,
                       const PackedPairs& packed)
      : WorkAhead(work, next.num_steps     ? next.num_pairs()
                        : args.next_w.data ? smaller(args.next_n, kMaxPrefetchedRows)
                                           : 0),
        fill_(next, columns, packed),
        next_w_(args.next_w),
        next_columns_{args.next_k0, args.next_k1, nullptr} {}
  KT_INLINE void finish() { fill_.finish(); }

 private:
  static void work(WorkAhead& base, uint32_t times) {
    auto& self = static_cast<BlockAhead&>(base);
    for (uint32_t i = 0; i < times; ++i) {
      if (self.fill_.pairs_left()) {
        self.fill_.pair();
      } else {
        self.next_columns_.prefetch<2>(self.next_w_, self.num_prefetched_++);
      }
    }
  }

  static constexpr uint32_t kMaxPrefetchedRows = 512;  // as many as stay in the cache until they are used
  BlockFill fill_;
  const WeightView next_w_;
  const WeightColumns next_columns_;
  uint32_t num_prefetched_ = 0;
};

// Walks over the blocks of so many columns: product.run(block, packed, is_first, ahead) for each.
template <class Product>
KT_INLINE void for_blocks(const NnArgs& args, uint32_t k0, uint32_t k1, Product& product) {
  const WeightColumns columns{k0, k1, args.scratch + 2 * kNnPackedBytes};
  NnBlocks blocks(args.terms, packed_steps(kNnPackedBytes, columns.size()));
  const PackedPairs packed[2] = {packed_pairs(args.scratch, blocks.steps()),
                                 packed_pairs(args.scratch + kNnPackedBytes, blocks.steps())};
  NnBlock block = blocks.next();
  BlockFill(block, columns, packed[0]).finish();
  for (uint32_t i = 0; block.num_steps > 0; ++i) {
    const NnBlock next = blocks.next();
    BlockAhead ahead(args, next, columns, packed[(i + 1) % 2]);
    product.run(block, packed[i % 2], i == 0, ahead);
    ahead.finish();
    block = next;
  }
}
