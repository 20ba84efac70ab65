// Activations in int8 (contract.h, QuantizedRow). Included inside a target's namespace, after
// quantize.h, which rounds weights the same way.

// Codes of a row, zeros behind them up to `padded`.
inline QuantizedRow quantize_row(const bf16* x, uint32_t k, uint32_t padded, std::byte* codes) {
  const WeightRow<bf16> row{reinterpret_cast<const std::byte*>(x), k};
  const float amax = row.amax(0, k);
  if (!is_number(amax)) {
    std::memset(codes, 0, padded);
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float scale = amax / 127.0f;
  store_int8_codes(row, 0, k, scale, codes);
  std::memset(codes + k, 0, padded - k);
  int32_t sum = 0;
  for (uint32_t i = 0; i < k; ++i) sum += static_cast<int8_t>(codes[i]);
  return {scale, sum};
}

// Rows of codes begin on cache lines. In memory: codes, then what became of each row.
KT_INLINE uint32_t int8_stride(uint32_t k) { return static_cast<uint32_t>(round_up(k, kCacheLine)); }
KT_INLINE size_t int8_rows_bytes(uint32_t m, uint32_t k) {
  return m * size_t{int8_stride(k)} + round_up(m * sizeof(QuantizedRow), kCacheLine);
}

inline Operand quantize_rows(const RowsView& rows, uint32_t m, uint32_t k, std::byte* data) {
  const uint32_t stride = int8_stride(k);
  auto* quantized = reinterpret_cast<QuantizedRow*>(data + m * size_t{stride});
  for (uint32_t i = 0; i < m; ++i) {
    const size_t row = rows.index ? rows.index[i] : i;
    quantized[i] = quantize_row(rows.data + row * rows.stride, k, stride, data + i * size_t{stride});
  }
  return {data, stride, nullptr, m, k, quantized};
}
