// TN on vectors: the pairs of a column of G lie a cache line apart where its rows are interleaved, and are
// broadcast from there. Included inside a target's namespace, after nn_rows.h and tn.h.

struct TnRows {
  KT_INLINE void add(const TnBlock& b) {
    const std::byte* left[kMaxTnRows];
    for (uint32_t n = 0; n < b.n; ++n)
      left[n] = b.g.data + n / kGroupColumns * b.g.group_bytes + n % kGroupColumns * 2 * sizeof(bf16);
    // Behind an odd end there are zeros, so the last pair is a whole one.
    const uint32_t length = static_cast<uint32_t>(round_up(b.length, 2));
    const PairsBlock block{left, b.n, 0, kPairsBytes, b.x, length, b.sums, b.stride, b.k, false};
    NothingAhead nothing;
    pairs_product(block, nothing);
  }
};

inline size_t tn_scratch_bytes_rows() { return kTnScratchBytes; }
inline void tn_rows(const TnArgs& args) { tn_product<TnRows>(args); }
