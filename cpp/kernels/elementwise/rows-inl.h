// Kernels on one row, element by element: loops that the compiler vectorizes without changing a bit.
// Included once per target, inside its namespace, after combine-inl.h.

inline void fill_nan_row(bf16* to, size_t size) {
  for (size_t i = 0; i < size; ++i) to[i].bits = 0x7fc0;
}

inline void copy_finite_row(const bf16* x, size_t size, bf16* to) {
  if (!row_is_finite(x, size)) return fill_nan_row(to, size);
  for (size_t i = 0; i < size; ++i) to[i] = x[i];
}

inline void scale_row(const bf16* x, float w, size_t size, bf16* to) {
  for (size_t i = 0; i < size; ++i) to[i] = to_bf16_unbranched(w * to_float(x[i]));
}

inline void scale_finite_row(const bf16* x, float w, size_t size, bf16* to) {
  scale_row(x, w, size, to);
  if (!row_is_finite(to, size)) fill_nan_row(to, size);
}

inline void round_scaled_row(const float* x, float w, size_t size, bf16* to) {
  for (size_t i = 0; i < size; ++i) to[i] = to_bf16_unbranched(w * x[i]);
}

inline void widen_row(const bf16* x, size_t size, float* to) {
  for (size_t i = 0; i < size; ++i) to[i] = to_float(x[i]);
}

inline void round_row(const float* x, size_t size, bf16* to) {
  for (size_t i = 0; i < size; ++i) to[i] = to_bf16_unbranched(x[i]);
}

inline void add_row(const float* x, size_t size, float* to) {
  for (size_t i = 0; i < size; ++i) to[i] += x[i];
}

inline float dot_row(const bf16* x, const float* y, size_t size) {
  float sum = 0;
  for (size_t i = 0; i < size; ++i) sum += to_float(x[i]) * y[i];
  return sum;
}

inline void dot_blocks_row(const float* x, const bf16* y, size_t size, float* blocks) {
  constexpr size_t kLanes = 8;  // sums side by side, halved in the end
  for (size_t begin = 0; begin < size; begin += kOutputBlock) {
    const size_t end = begin + kOutputBlock < size ? begin + kOutputBlock : size;
    float lanes[kLanes] = {};
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (size_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * to_float(y[i + j]);
    for (size_t j = 0; i + j < end; ++j) lanes[j] += x[i + j] * to_float(y[i + j]);
    for (size_t half = kLanes / 2; half > 0; half /= 2)
      for (size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    *blocks++ = lanes[0];
  }
}

inline float sum_row(const float* x, size_t size) {
  float total = 0;
  for (size_t i = 0; i < size; ++i) total += x[i];
  return total;
}

// Philox4x32-10 of Salmon, Moraes, Dror and Shaw (2011).
KT_INLINE void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int step = 0; step < 10; ++step) {
    const uint64_t first = uint64_t{0xD2511F53u} * c[0], second = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(second >> 32) ^ c[1] ^ k0, c[1] = static_cast<uint32_t>(second);
    c[2] = static_cast<uint32_t>(first >> 32) ^ c[3] ^ k1, c[3] = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

inline void draw_mask_row(const DropoutKey& key, uint32_t token, uint32_t features, uint8_t* bits) {
  const auto threshold = static_cast<uint32_t>(key.rate * 0x1p32);
  const auto k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (uint32_t f = 0; f < features; f += 8) {
    uint32_t byte = 0;
    for (uint32_t i = 0; i < 8 && f + i < features; i += 4) {
      uint32_t words[4] = {(f + i) / 4, token, key.step, 2 * key.layer + key.which};
      philox(words, k0, k1);
      for (uint32_t j = 0; j < 4 && f + i + j < features; ++j)
        byte |= static_cast<uint32_t>(words[j] >= threshold) << (i + j);
    }
    bits[f / 8] = static_cast<uint8_t>(byte);
  }
}

template <class T>
inline void mask_row(const T* x, const uint8_t* bits, uint32_t first, uint32_t size, T* to) {
  for (uint32_t i = 0; i < size; ++i) {
    const uint32_t f = first + i;
    to[i] = (bits[f / 8] >> (f % 8) & 1) != 0 ? x[i] : T{};
  }
}

constexpr ElementwiseKernels kElementwise = {
    .copy_finite = copy_finite_row,
    .scale = scale_row,
    .scale_finite = scale_finite_row,
    .round_scaled = round_scaled_row,
    .widen = widen_row,
    .round = round_row,
    .add = add_row,
    .dot = dot_row,
    .dot_blocks = dot_blocks_row,
    .sum = sum_row,
    .draw_mask = draw_mask_row,
    .mask_bf16 = mask_row<bf16>,
    .mask_float = mask_row<float>,
};
