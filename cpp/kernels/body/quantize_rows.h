// Activations in int8 (contract.h, QuantizedRow). Included inside a target's namespace.

// Codes of a row, which is gathered from memory of bf16, zeros behind them up to `padded`.
inline QuantizedRow quantize_row(const bf16* x, uint32_t k, uint32_t padded, int8_t* codes) {
  uint16_t most = 0;  // of the bits without the sign, which order as the sizes do
  for (uint32_t i = 0; i < k; ++i) {
    const uint16_t size = x[i].bits & 0x7fff;
    most = size > most ? size : most;
  }
  constexpr uint16_t kInfinity = 0x7f80;
  if (most == 0 || most >= kInfinity) {
    std::memset(codes, 0, padded);
    return {most == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
  const float scale = to_float(bf16{most}) / 127.0f;
  int32_t sum = 0;
  for (uint32_t i = 0; i < k; ++i) {
    const float steps = to_float(x[i]) / scale;
    const int32_t code = static_cast<int32_t>((steps + kRound) - kRound);
    codes[i] = static_cast<int8_t>(code < -127 ? -127 : code > 127 ? 127 : code);
    sum += codes[i];
  }
  std::memset(codes + k, 0, padded - k);
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
    auto* codes = reinterpret_cast<int8_t*>(data + i * size_t{stride});
    quantized[i] = quantize_row(rows.data + row * rows.stride, k, stride, codes);
  }
  return {data, stride, nullptr, m, k, quantized};
}
