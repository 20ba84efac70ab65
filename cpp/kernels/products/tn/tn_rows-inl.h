// TN on vectors: the pairs of a column of G are one cache line apart where its rows are interleaved, and are
// broadcast from there. Included inside a target's namespace, after nn_rows-inl.h and tn-inl.h.

struct TnRows {
  KT_INLINE void add(const TnBlock& b) {
    // Behind an odd end there are zeros, so the last pair is a whole one.
    const uint32_t length = static_cast<uint32_t>(round_up(b.length, 2));
    PairsBlock block;
    block.num_slices = 1, block.num_steps = static_cast<uint32_t>(div_up(length, kPairsStep));
    block.slices[0] = {b.g.data, b.g.group_bytes, kPairsBytes, nullptr, kGroupColumns, length, 0};
    block.num_lhs = b.n, block.rhs = b.x;
    block.c = b.sums, block.c_stride = b.stride, block.columns = b.k, block.zero_first = false;
    NothingAhead nothing;
    pairs_product(block, nothing);
  }
};

inline size_t tn_scratch_bytes() { return kTnScratchBytes; }
inline void tn(const TnArgs& args) { tn_product<TnRows>(args); }
