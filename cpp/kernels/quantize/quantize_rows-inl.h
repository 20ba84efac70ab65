// Activations in int8 (contract.h, QuantizedRow). Included inside a target's namespace, after
// quantize-inl.h, which rounds weights the same way.

// The largest size of a row; an infinity or NaN when it is not finite. Bits without the sign order as sizes
// do.
inline float amax_of_row(const bf16* x, uint32_t k) {
  uint16_t most = 0;
  for (uint32_t i = 0; i < k; ++i) {
    const uint16_t size = x[i].bits & 0x7fff;
    most = size > most ? size : most;
  }
  return to_float(bf16{most});
}

// The sum of a row's codes; `padded` is a whole number of steps.
inline int32_t sum_of_codes(const std::byte* codes, uint32_t padded) {
  alignas(kCacheLine) std::byte ones[kByteStep];
  std::memset(ones, 1, sizeof ones);
  const Vec::Bytes one = Vec::load_bytes(ones);
  Vec::IntAcc acc[1] = {Vec::zero_int()};
  for (uint32_t i = 0; i < padded; i += kByteStep) Vec::dot_bytes(acc[0], one, Vec::load_bytes(codes + i));
  int32_t sum;
  Vec::reduce_int(acc, &sum);
  return sum;
}

// Divides as a division rounds, by an exact remainder, which costs less: x in bf16 by the 127th part of an
// amax.
struct DivideBy {
  static constexpr float kLeastAmax = 0x1p-90f;  // from which on no remainder that counts is denormal
  Float divisor, minus_divisor, reciprocal;
  KT_INLINE explicit DivideBy(float d)
      : divisor(Vec::set(d)), minus_divisor(Vec::set(-d)), reciprocal(Vec::set(1.0f / d)) {}
  KT_INLINE Float operator()(const Float& x) const {
    if constexpr (!Vec::kFusesFma) return Vec::div(x, divisor);
    const Float near = Vec::mul(x, reciprocal);
    return Vec::fma(Vec::fma(near, minus_divisor, x), reciprocal, near);
  }
};

// Codes of a row, zeros behind them up to `padded`.
inline QuantizedRow quantize_row(const bf16* x, uint32_t k, uint32_t padded, std::byte* codes) {
  const float amax = amax_of_row(x, k), scale = amax / 127.0f;
  if (!is_number(amax)) {
    std::memset(codes, 0, padded);
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const WeightRow<bf16> row{reinterpret_cast<const std::byte*>(x), k};
  if (amax < DivideBy::kLeastAmax) {
    store_int8_codes(row, 0, k, scale, codes);
  } else {
    const DivideBy steps(scale);
    // What reaches behind the row is padding: rows of codes are whole cache lines.
    for (uint32_t at = 0; at < k; at += Vec::kWidth)
      Vec::store_int8(reinterpret_cast<int8_t*>(codes + at), steps(row.load(at)));
  }
  std::memset(codes + k, 0, padded - k);
  return {scale, sum_of_codes(codes, padded)};
}

// Sums of `count` codes.
inline int16_t sum_of(const std::byte* codes, int count) {
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<int8_t>(codes[i]);
  return static_cast<int16_t>(sum);
}

inline void quantize_blocks(const RowsView& rows, uint32_t m, uint32_t k, uint32_t block, std::byte* to) {
  const BlockRowLayout layout(k, block);
  for (uint32_t i = 0; i < m; ++i, to += layout.stride()) {
    const bf16* x = rows.data + (rows.index ? rows.index[i] : i) * rows.stride;
    auto* scales = reinterpret_cast<float*>(to + layout.scales());
    for (uint32_t at = 0; at < k; at += block)
      *scales++ = quantize_row(x + at, k - at < block ? k - at : block, block, to + at).scale;
    auto* sums16 = reinterpret_cast<int16_t*>(to + layout.sums16());
    auto* sums32 = reinterpret_cast<int16_t*>(to + layout.sums32());
    for (uint32_t at = 0; at < layout.padded; at += 16) sums16[at / 16] = sum_of(to + at, 16);
    for (uint32_t g = 0; g < layout.padded / 32; ++g)
      sums32[g] = static_cast<int16_t>(sums16[2 * g] + sums16[2 * g + 1]);
  }
}

inline void quantize_rows(const RowsView& rows, uint32_t m, uint32_t k, const Int8Rows& to) {
  const auto padded = static_cast<uint32_t>(to.stride);
  for (uint32_t i = 0; i < m; ++i) {
    const size_t row = rows.index ? rows.index[i] : i;
    to.row[i] = quantize_row(rows.data + row * rows.stride, k, padded, to.codes + i * to.stride);
  }
}
