// Integers times the factors of their groups as two digits of a byte each. Included inside a target's
// namespace, after ints_portable.h. See digits_avx512.h.

using GroupFactors = const uint64_t*;
template <size_t kGroups>
KT_INLINE GroupFactors group_factors(const uint64_t* words) {
  return words;
}

template <size_t kGroups>
KT_INLINE void store_digits(const Bytes32 (&integers)[2], GroupFactors factors, size_t g, std::byte* high,
                            std::byte* low) {
  for (size_t i = 0; i < 64; ++i) {
    const int product = static_cast<int8_t>(integers[i / 32].lane[i % 32]) *
                        group_word(factors, (64 * g + i) / (256 / kGroups));
    high[i] = static_cast<std::byte>(product >> 7), low[i] = static_cast<std::byte>(product & 127);
  }
}

struct DigitTable {
  int8_t high[16], low[16];
};
KT_INLINE void look_up_digits(const Bytes32 (&nibbles)[2], const DigitTable& first, const DigitTable& second,
                              std::byte* high, std::byte* low) {
  for (size_t i = 0; i < 64; ++i) {
    const DigitTable& table = i < 32 ? first : second;
    const uint8_t nibble = nibbles[i / 32].lane[i % 32];
    high[i] = static_cast<std::byte>(table.high[nibble]), low[i] = static_cast<std::byte>(table.low[nibble]);
  }
}
