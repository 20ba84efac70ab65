// TN on the tile unit: groups of G's columns, interleaved, are transposed to the tiles of a lhs operand.
// Included inside a target's namespace, after nn_tiles-inl.h and tn-inl.h.

struct TnTiles {
  TileScope scope;

  // Panels [steps][rows][32] as nn_tiles-inl.h has them. Of a last panel with fewer rows, a step overwrites
  // what the one before it has too many.
  KT_INLINE Operand pack(const TnBlock& b) {
    const size_t steps = div_up(b.length, kTileK);
    const Operand lhs{b.scratch, steps * kTileBytes, nullptr, b.n, b.length};
    for (uint32_t p = 0; p < num_groups(b.n); ++p) {
      uint32_t* to = reinterpret_cast<uint32_t*>(b.scratch + p * lhs.stride_bytes);
      const std::byte* row[kTileRows];
      for (uint32_t i = 0; i < kTileRows; ++i) row[i] = b.g.data + p * b.g.group_bytes + i * kPairsBytes;
      for (size_t s = 0; s < steps; ++s, to += panel_width(lhs, p) * kTileK / 2)
        transpose_dwords(row, s * kTileRows * kPairsBytes, to);
    }
    return lhs;
  }

  KT_INLINE void add(const TnBlock& b) {
    PairsTiles t;
    t.num_slices = 1, t.num_steps = static_cast<uint32_t>(div_up(b.length, kTileK));
    t.slices[0] = {pack(b), 0, t.num_steps, 0};
    t.num_lhs = b.n, t.rhs = b.x;
    t.c = b.sums, t.c_stride = b.stride, t.zero_first = false;
    NothingAhead nothing;
    pairs_product(scope, t, b.k, nothing);
  }
};

inline size_t tn_scratch_bytes() { return kTnScratchBytes + kTnLhsBytes; }
inline void tn(const TnArgs& args) { tn_product<TnTiles>(args); }
