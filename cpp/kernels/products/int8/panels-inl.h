// Products of encoded weights with many rows of activations in int8 (contract_int8.h): weights are decoded
// once, a panel at a time.
//
// A panel is one block of K of as many weight rows as a vector has lanes. Its codes are in quads, so that a
// step multiplies one quad of every row with one quad of a row of activations, and a lane is an output:
//
//   codes[quad]  [row 0: 4 codes][row 1: 4 codes] ..     x[quad] in every lane     sums[row 0][row 1] ..
//
// Included inside a target's namespace, after few_rows-inl.h.

inline constexpr size_t kLanes = PanelVec::kLanes;
inline constexpr size_t kMostBlock = 256;

struct Panel {
  alignas(kCacheLine) std::byte codes[kMostBlock / 4][kLanes][4];
  // Of each group: its scale, and the offset of formats that have one.
  alignas(kCacheLine) float scale[8][kLanes], offset[8][kLanes];
  // Integer factors of pairs of groups, then those of offsets.
  alignas(kCacheLine) int16_t factor_pairs[8][kLanes][2], offset_pairs[8][kLanes][2];
  std::byte* pairs() { return reinterpret_cast<std::byte*>(factor_pairs); }
};

// What the product of a panel depends on.
struct PanelKind {
  size_t group;          // values that share a float32 scale
  size_t factor_groups;  // of a block, that have integer factors; 0: none
  bool has_offset, is_narrow;
};
template <class Format>
inline constexpr PanelKind kPanelKind = [] {
  using Of = Integers<Format>;
  PanelKind kind{Of::kGroup, 0, Of::kHasOffset, Of::kNarrow};
  if constexpr (Of::kHasFactors) kind.factor_groups = Format::kGroups;
  return kind;
}();

// `columns` columns from `at` on of kLanes rows.
template <class Format>
void decode_panel(const EightRows* rows, size_t at, size_t columns, Panel& panel) {
  using Of = Integers<Format>;
  alignas(kCacheLine) std::byte codes[kLanes][kMostBlock];
  constexpr size_t kEights = kLanes / 8;
  for (size_t e = 0; e < kEights; ++e) {
    for (int r = 0; r < 8; ++r) {
      std::byte* row = codes[8 * e + static_cast<size_t>(r)];
      if (columns == Of::kBlock) {
        KT_UNROLL for (size_t k = 0; k < Of::kBlock; k += 32)
            store_32(row + k, Of::codes(rows[e], r, at + k));
      } else {
        std::memset(row, 0, Of::kBlock);
        KT_NO_UNROLL for (size_t k = 0; k < columns; k += 32)
            store_32(row + k, Of::codes(rows[e], r, at + k));
      }
    }
  }
  for (size_t k = 0; k < Of::kBlock; k += PanelVec::kTransposedBytes)
    PanelVec::transpose(codes[0] + k, kMostBlock, panel.codes[k / 4][0]);

  for (size_t e = 0; e < kEights; ++e) {
    const auto scales = Of::open(rows[e], at / Of::kGroup);
    for (size_t g = 0; g < div_up(columns, Of::kGroup); ++g) {
      store_8(panel.scale[g] + 8 * e, scales.scale(g));
      if constexpr (Of::kHasOffset)
        store_8(panel.offset[g] + 8 * e, Of::offsets(rows[e], at / Of::kGroup + g));
    }
  }
  if constexpr (Of::kHasFactors) {
    constexpr size_t kBytes = sizeof(int16_t) * 2 * 16;  // of the pairs of a row
    alignas(kCacheLine) std::byte words[kLanes][kBytes];
    for (size_t lane = 0; lane < kLanes; ++lane) {
      formats::GroupNumbers numbers;
      Format::group_numbers(Of::block(rows[lane / 8].row(static_cast<int>(lane % 8)), at), numbers);
      store_words(words[lane], group_words<Format::kGroups>(numbers.scale));
      if constexpr (Of::kHasOffset)
        store_words(words[lane] + kBytes / 2, group_words<Format::kGroups>(numbers.offset));
    }
    for (size_t b = 0; b < (Of::kHasOffset ? kBytes : kBytes / 2); b += PanelVec::kTransposedBytes)
      PanelVec::transpose(words[0] + b, kBytes, panel.pairs() + b * kLanes);
  }
}

// Sums over a block of activations: kTokens rows of them, from column k on, with kPanels panels. `sums` are
// those of the blocks before, [row][lanes of the panels].
struct PanelStep {
  const Panel* panels;
  const BlockRow* x;
  size_t k, block, groups;
  int bias;
  float* sums;
};
inline constexpr size_t kSumsStride = kLanes * PanelVec::kPanels;

// Quads [begin, begin + kQuads) of the codes, of one group.
template <PanelKind kKind, int kTokens, size_t kQuads>
KT_INLINE void dot_quads_of_group(const PanelStep& step, size_t begin,
                                  PanelVec::Ints (&acc)[kTokens][PanelVec::kPanels]) {
  constexpr int kPanels = PanelVec::kPanels;
  KT_UNROLL for (int t = 0; t < kTokens; ++t) KT_UNROLL for (int p = 0; p < kPanels; ++p) acc[t][p] =
      PanelVec::zero();
  for (size_t q = begin; q < begin + kQuads; ++q) {
    PanelVec::Ints codes[kPanels];
    KT_UNROLL for (int p = 0; p < kPanels; ++p) codes[p] = PanelVec::load(step.panels[p].codes[q]);
    KT_UNROLL for (int t = 0; t < kTokens; ++t) {
      const PanelVec::Ints x = PanelVec::broadcast(step.x[t].codes + step.k + 4 * q);
      KT_UNROLL for (int p = 0; p < kPanels; ++p) acc[t][p] =
          PanelVec::dot_codes<kKind.is_narrow>(acc[t][p], codes[p], x);
    }
  }
}

template <PanelKind kKind, int kTokens>
KT_INLINE void dot_panel_groups(const PanelStep& step, PanelVec::Floats (&sums)[kTokens][PanelVec::kPanels]) {
  constexpr int kPanels = PanelVec::kPanels;
  constexpr size_t kQuads = kKind.group / 4;
  for (size_t g = 0; g < step.groups; ++g) {
    PanelVec::Ints acc[kTokens][kPanels];
    dot_quads_of_group<kKind, kTokens, kQuads>(step, g * kQuads, acc);
    KT_UNROLL for (int t = 0; t < kTokens; ++t) {
      int32_t sum_of_x = 0;
      const int16_t* of_x = step.x[t].sums16 + step.k / 16 + g * (kKind.group / 16);
      for (size_t i = 0; i < kKind.group / 16; ++i) sum_of_x += of_x[i];
      const PanelVec::Ints less = PanelVec::set(step.bias * sum_of_x);
      const PanelVec::Floats scale_of_x = PanelVec::set_f(step.x[t].scales[step.block]);
      KT_UNROLL for (int p = 0; p < kPanels; ++p) {
        const auto scale = PanelVec::mul(PanelVec::load_f(step.panels[p].scale[g]), scale_of_x);
        sums[t][p] = PanelVec::fma(scale, PanelVec::floats(PanelVec::minus(acc[t][p], less)), sums[t][p]);
        if constexpr (kKind.has_offset) {
          const auto offset = PanelVec::mul(PanelVec::load_f(step.panels[p].offset[g]), scale_of_x);
          sums[t][p] = PanelVec::fma(offset, PanelVec::set_f(static_cast<float>(sum_of_x)), sums[t][p]);
        }
      }
    }
  }
}

// A block of 256 values whose groups have integer factors.
template <PanelKind kKind, int kTokens>
KT_INLINE void dot_panel_factors(const PanelStep& step,
                                 PanelVec::Floats (&sums)[kTokens][PanelVec::kPanels]) {
  constexpr int kPanels = PanelVec::kPanels;
  constexpr size_t kGroups = kKind.factor_groups, kQuads = kMostBlock / kGroups / 4;
  PanelVec::Ints total[kTokens][kPanels], acc[kTokens][kPanels];
  KT_UNROLL for (int t = 0; t < kTokens; ++t) KT_UNROLL for (int p = 0; p < kPanels; ++p) total[t][p] =
      PanelVec::zero();
  for (size_t g = 0; g < kGroups; g += 2) {
    dot_quads_of_group<kKind, kTokens, kQuads>(step, g * kQuads, acc);
    KT_UNROLL for (int p = 0; p < kPanels; ++p) {
      const auto factor = PanelVec::low_words(PanelVec::load(step.panels[p].factor_pairs[g / 2]));
      KT_UNROLL for (int t = 0; t < kTokens; ++t) total[t][p] =
          PanelVec::add_product(total[t][p], acc[t][p], factor);
    }
    dot_quads_of_group<kKind, kTokens, kQuads>(step, (g + 1) * kQuads, acc);
    KT_UNROLL for (int p = 0; p < kPanels; ++p) {
      const auto factor = PanelVec::high_words(PanelVec::load(step.panels[p].factor_pairs[g / 2]));
      KT_UNROLL for (int t = 0; t < kTokens; ++t) total[t][p] =
          PanelVec::add_product(total[t][p], acc[t][p], factor);
    }
  }
  KT_UNROLL for (int t = 0; t < kTokens; ++t) {
    const int16_t* of_x = kGroups == 16 ? step.x[t].sums16 + step.k / 16 : step.x[t].sums32 + step.k / 32;
    const PanelVec::Floats scale_of_x = PanelVec::set_f(step.x[t].scales[step.block]);
    KT_UNROLL for (int p = 0; p < kPanels; ++p) {
      const Panel& panel = step.panels[p];
      PanelVec::Ints less = PanelVec::zero(), offsets = PanelVec::zero();
      for (size_t g = 0; g < kGroups; g += 2) {
        const PanelVec::Ints pair = PanelVec::broadcast(of_x + g);
        if (step.bias != 0) less = PanelVec::dot_words(less, PanelVec::load(panel.factor_pairs[g / 2]), pair);
        if constexpr (kKind.has_offset)
          offsets = PanelVec::dot_words(offsets, PanelVec::load(panel.offset_pairs[g / 2]), pair);
      }
      const auto whole = PanelVec::add_product(total[t][p], less, PanelVec::set(-step.bias));
      const auto scale = PanelVec::mul(PanelVec::load_f(panel.scale[0]), scale_of_x);
      sums[t][p] = PanelVec::fma(scale, PanelVec::floats(whole), sums[t][p]);
      if constexpr (kKind.has_offset) {
        const auto minus = PanelVec::set_f(-step.x[t].scales[step.block]);
        const auto offset = PanelVec::mul(PanelVec::load_f(panel.offset[0]), minus);
        sums[t][p] = PanelVec::fma(offset, PanelVec::floats(offsets), sums[t][p]);
      }
    }
  }
}

template <PanelKind kKind, int kTokens>
__attribute__((noinline)) void dot_panels(const PanelStep& step) {
  constexpr int kPanels = PanelVec::kPanels;
  PanelVec::Floats sums[kTokens][kPanels];
  KT_UNROLL for (int t = 0; t < kTokens; ++t) KT_UNROLL for (int p = 0; p < kPanels; ++p) sums[t][p] =
      PanelVec::load_f(step.sums + static_cast<size_t>(t) * kSumsStride + static_cast<size_t>(p) * kLanes);
  if constexpr (kKind.factor_groups > 0) {
    dot_panel_factors<kKind, kTokens>(step, sums);
  } else {
    dot_panel_groups<kKind, kTokens>(step, sums);
  }
  KT_UNROLL for (int t = 0; t < kTokens; ++t) KT_UNROLL for (int p = 0; p < kPanels; ++p) PanelVec::store_f(
      step.sums + static_cast<size_t>(t) * kSumsStride + static_cast<size_t>(p) * kLanes, sums[t][p]);
}

// Columns [at, k) of rows that end inside a block.
template <class Format>
void decode_rest_of_panel(const EightRows* rows, size_t at, size_t k, Panel& panel) {
  constexpr size_t kEights = kLanes / 8;
  RestOfRows<Format> rest[kEights];
  EightRows of_rest[kEights];
  for (size_t e = 0; e < kEights; ++e) rest[e].copy(rows[e], at, k), of_rest[e] = rest[e].rows;
  decode_panel<Format>(of_rest, 0, k - at, panel);
}

// Those outputs of all rows of activations; `sums` has room for kSumsStride of each.
template <class Format>
void dot_panel_rows(const NtArgs& args, const EightOutputs (&outputs)[kSumsStride / 8], float* sums) {
  using Of = Integers<Format>;
  const uint32_t rows = args.x.rows;
  const size_t k = args.x.k;
  EightRows eights[kSumsStride / 8];
  for (size_t e = 0; e < kSumsStride / 8; ++e) eights[e] = outputs[e].rows;
  std::memset(sums, 0, rows * kSumsStride * sizeof(float));
  const BlockRowLayout layout(args.x.k, Of::kBlock);
  Panel panels[PanelVec::kPanels];
  for (size_t at = 0; at < k; at += Of::kBlock) {
    const size_t columns = k - at < Of::kBlock ? k - at : Of::kBlock;
    for (size_t p = 0; p < PanelVec::kPanels; ++p) {
      const EightRows* of_panel = eights + p * kLanes / 8;
      if (BlockFormat<Format> || columns == Of::kBlock) {
        decode_panel<Format>(of_panel, at, columns, panels[p]);
      } else if constexpr (!BlockFormat<Format>) {
        decode_rest_of_panel<Format>(of_panel, at, k, panels[p]);
      }
    }
    // While the rows of activations pass, the next block of weights comes, in the end that of the rows
    // behind.
    const size_t next = at + Of::kBlock;
    for (const EightRows& rows_of : eights)
      prefetch_block<Format>(next < k ? rows_of : rows_of.behind(kSumsStride), next < k ? next : 0);
    PanelStep step{panels, nullptr, at, at / Of::kBlock, div_up(columns, Of::kGroup), kQuadBias<Of>, sums};
    for (uint32_t m = 0; m < rows;) {
      constexpr uint32_t kTokens = PanelVec::kTokens;
      const uint32_t tokens = rows - m < kTokens ? 1 : kTokens;
      BlockRow x[kTokens];
      for (uint32_t t = 0; t < tokens; ++t) x[t] = block_row(args, m + t, layout);
      step.x = x, step.sums = sums + m * kSumsStride;
      if (tokens == 1) {
        dot_panels<kPanelKind<Format>, 1>(step);
      } else {
        dot_panels<kPanelKind<Format>, PanelVec::kTokens>(step);
      }
      m += tokens;
    }
  }
  for (size_t e = 0; e < kSumsStride / 8; ++e) {
    const EightOutputs& of = outputs[e];
    for (uint32_t m = 0; m < rows && of.count > 0; ++m) {
      const Floats8 sum = load_8(sums + m * kSumsStride + 8 * e);
      store_outputs(args, m, of.n, of.first, of.count, with_channel_scale<Format>(of.rows, sum));
    }
  }
}

template <class Format>
void int8_panels(const NtArgs& args) {
  alignas(kCacheLine) float sums[kMaxCallRows * kSumsStride];
  for (uint32_t n = args.n0; n < args.n1;) {
    EightOutputs outputs[kSumsStride / 8];
    for (EightOutputs& of : outputs) {
      of = next_eight<Format>(args, n < args.n1 ? n : args.n1 - 1);
      if (n >= args.n1) of.count = 0;
      n += of.count;
    }
    dot_panel_rows<Format>(args, outputs, sums);
  }
}
