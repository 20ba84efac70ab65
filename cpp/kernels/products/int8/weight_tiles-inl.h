// Weights as the tile unit takes them in products with activations in int8: blocks of K of 32 rows, decoded
// to tiles of signed bytes. Included inside a target's namespace, after integers-inl.h.

inline constexpr size_t kGroupTiles = kGroupRows / kTileRows;

// The digits of a format's 16 integers times factors of six bits, unsigned or signed.
inline constexpr int kLeastFactor = -32, kMostFactor = 63;
template <const auto& kTable>
struct DigitTables {
  DigitTable of[kMostFactor - kLeastFactor + 1] = {};
  constexpr DigitTables() {
    for (int factor = kLeastFactor; factor <= kMostFactor; ++factor) {
      for (int i = 0; i < 16; ++i) {
        const int product = kTable[i] * factor;
        of[factor - kLeastFactor].high[i] = static_cast<int8_t>(product >> 7);
        of[factor - kLeastFactor].low[i] = static_cast<int8_t>(product & 127);
      }
    }
  }
};
template <const auto& kTable>
inline constexpr DigitTables<kTable> kDigitTables;

// A block of K of 32 weight rows: tiles of codes, and what is applied to their sums.
template <class Format>
struct WeightTiles {
  using Of = Integers<Format>;
  static constexpr size_t kColumns = Of::kGroup < kTileColumns ? Of::kGroup : kTileColumns;
  static constexpr size_t kTiles = Of::kBlock / kColumns, kDigits = Of::kHasFactors ? 2 : 1;
  static constexpr size_t kGroups = Of::kBlock / Of::kGroup, kTilesOfGroup = Of::kGroup / kColumns;

  alignas(kCacheLine) std::byte codes[kDigits][kTiles][kGroupTiles][kTileRows][kColumns];
  alignas(kCacheLine) float scale[kGroups][kGroupRows], offset[kGroups][kGroupRows];
  alignas(kCacheLine) int16_t offset_pairs[kGroupRows][16];

  // Columns [at, at + columns) of rows [8 e, 8 e + 8).
  void decode(const EightRows& rows, size_t e, size_t at, size_t columns) {
    for (int r = 0; r < 8; ++r) decode_row(rows, r, 8 * e + static_cast<size_t>(r), at, columns);
    const auto scales = Of::open(rows, at / Of::kGroup);
    for (size_t g = 0; g < div_up(columns, Of::kGroup); ++g) {
      store_8(scale[g] + 8 * e, scales.scale(g));
      if constexpr (Of::kHasOffset) store_8(offset[g] + 8 * e, Of::offsets(rows, at / Of::kGroup + g));
    }
  }

 private:
  void decode_row(const EightRows& rows, int r, size_t n, size_t at, size_t columns) {
    if constexpr (!Of::kHasFactors) {
      for (size_t k = 0; k < Of::kBlock; k += 32)
        store(k, n, k < columns ? minus(Of::codes(rows, r, at + k), Of::kBias) : zero_bytes());
    } else {
      const std::byte* block = Of::block(rows.row(r), at);
      formats::GroupNumbers numbers;
      Format::group_numbers(block, numbers);
      if constexpr (Of::kHasOffset)
        store_words(reinterpret_cast<std::byte*>(offset_pairs[n]),
                    group_words<Format::kGroups>(numbers.offset));
      store_integers(rows, r, n, at, numbers);
    }
  }
  // Times their factors, in digits.
  void store_integers(const EightRows& rows, int r, size_t n, size_t at,
                      const formats::GroupNumbers& numbers) {
    if constexpr (requires { Unpack<Format>::kTable; }) {
      static_assert(Format::kGroups == 8);
      const std::byte* block = Of::block(rows.row(r), at);
      KT_UNROLL for (size_t t = 0; t < kTiles; ++t) {
        const Bytes32 nibbles[2] = {Unpack<Format>::template nibbles<PlainNibbles>(block, 2 * t),
                                    Unpack<Format>::template nibbles<PlainNibbles>(block, 2 * t + 1)};
        const DigitTable* tables[2];
        KT_UNROLL for (size_t i = 0; i < 2; ++i) {
          const auto factor = static_cast<int8_t>(numbers.scale[0] >> 8 * (2 * t + i));
          tables[i] = &kDigitTables<Unpack<Format>::kTable>.of[factor - kLeastFactor];
        }
        look_up_digits(nibbles, *tables[0], *tables[1], row_of_tile(0, t, n), row_of_tile(1, t, n));
      }
    } else {
      const GroupFactors factors = group_factors<Format::kGroups>(numbers.scale);
      KT_UNROLL for (size_t t = 0; t < kTiles; ++t) {
        const size_t k = at + t * kTileColumns;
        const Bytes32 integers[2] = {minus(Of::codes(rows, r, k), Of::kBias),
                                     minus(Of::codes(rows, r, k + 32), Of::kBias)};
        store_digits<Format::kGroups>(integers, factors, t, row_of_tile(0, t, n), row_of_tile(1, t, n));
      }
    }
  }
  std::byte* row_of_tile(size_t digit, size_t tile, size_t n) {
    return codes[digit][tile][n / kTileRows][n % kTileRows];
  }
  void store(size_t k, size_t n, const Bytes32& codes_of_32) {
    if constexpr (kColumns < 32) {
      alignas(32) std::byte both[32];
      store_32(both, codes_of_32);
      std::memcpy(row_of_tile(0, k / 16, n), both, 16);
      std::memcpy(row_of_tile(0, k / 16 + 1, n), both + 16, 16);
    } else {
      store_32(row_of_tile(0, k / kColumns, n) + k % kColumns, codes_of_32);
    }
  }
};
