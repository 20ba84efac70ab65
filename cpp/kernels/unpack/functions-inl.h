// Runs of rows in blocks, by format: each becomes a function. Included inside a target's namespace, after
// blocks-inl.h.

// Elements [k0, k1) of a row, kRunElements of them every `stride` bytes; k0 a multiple of 32, k1 the row's
// end or another. Behind the row's end zeros fill a vector.
template <class Format>
struct UnpackRun {
  static void run(const std::byte* row, size_t k0, size_t k1, std::byte* to, ptrdiff_t stride) {
    RunWriter out(to, stride);
    for (size_t k = k0; k < k1;) {
      const size_t block = k / Format::kBlock, begin = block * Format::kBlock;
      const size_t end = begin + Format::kBlock < k1 ? begin + Format::kBlock : k1;
      const std::byte* data = row + block * Format::kBlockBytes;
      typename Format::Scales scales;
      open_block<Format>(data, scales);
      if constexpr (HasUnpack<Format>) {
        if (k == begin && end == begin + Format::kBlock) {
          KT_UNROLL for (size_t g = 0; g < Format::kBlock / 32; ++g)
              store_group<Format>(data, scales, g, out);
          k = end;
        }
      }
      for (; k < end; k += 32) store_group<Format>(data, scales, (k - begin) / 32, out);
    }
  }
};

template <PlainFormat Format>
struct UnpackRun<Format> {
  static void run(const std::byte* row, size_t k0, size_t k1, std::byte* to, ptrdiff_t stride) {
    RunWriter out(to, stride);
    size_t k = k0;
    for (; k + Vec::kStep <= k1; k += Vec::kStep)
      store_plain<Format>(row + Format::row_bytes(k), out.place());
    if (k == k1) return;
    std::byte last[Format::row_bytes(Vec::kStep)] = {};
    std::memcpy(last, row + Format::row_bytes(k), Format::row_bytes(k1 - k));
    store_plain<Format>(last, out.place());
  }
};

template <class Format>
constexpr UnpackFunction unpack_function() {
  if constexpr (BlockFormat<Format>) {
    return UnpackRun<Format>::run;
  } else {
    return nullptr;
  }
}

// Columns of a row; k0 a multiple of 32.
template <class Format>
struct DecodeColumns {
  static void run(const WeightView& w, uint32_t n, uint32_t k0, uint32_t k1, std::byte* to) {
    if constexpr (BlockFormat<Format>) {
      UnpackRun<Format>::run(w.row(n), k0, k1, to, kRunElements * sizeof(bf16));
    } else {
      using Row = typename Unpack<Format>::Row;
      static_assert(UnpackRow<Row> && (!Format::kIsInteger || UnpackIntegerRow<Row>));
      const Row row(w, n);
      uint32_t k = k0;
      for (; k + Vec::kStep <= k1; k += Vec::kStep, to += Vec::kStep * sizeof(bf16))
        Vec::store(to, row.weights(k));
      if (k < k1) Vec::store(to, row.weights_tail(k, k1 - k));
    }
  }
};
