// The end of a layer: a token's experts are added in slot order in fp32 and rounded once.
// Included inside a target's namespace, after elements-inl.h.

// Whether all values of a row are finite.
inline bool row_is_finite(const bf16* row, size_t count) {
  uint32_t bad = 0;
  for (size_t i = 0; i < count; ++i) bad |= !is_finite(row[i]);
  return bad == 0;
}

KT_INLINE Float load_base(const CombineArgs& a, size_t at, size_t count) {
  if (a.base == nullptr) return Vec::set(0.0f);
  return load_partial(a.base, a.base_type, at, count);
}

// The rows of the next token are prefetched meanwhile: other cores wrote them, in no order.
inline void combine_token(const CombineArgs& a, uint32_t t) {
  const int32_t* row = a.row + size_t{t} * a.slots;
  const int32_t* next = t + 1 < a.tokens ? row + a.slots : row;
  const float one = 1;
  const float* weight = a.weights ? a.weights + size_t{t} * a.slots : &one;
  const size_t step = a.weights ? 1 : 0;
  bool computed = false;
  for (uint32_t p = 0; p < a.slots; ++p) computed |= row[p] >= 0;
  const bool poisoned = computed && !row_is_finite(a.hidden + size_t{t} * a.hidden_size, a.hidden_size);

  for (size_t j = 0; j < a.columns; j += Vec::kWidth) {
    const size_t count = a.columns - j, at = t * a.out_stride + j;
    Float sum = load_base(a, at, count);
    for (uint32_t p = 0; p < a.slots; ++p) {
      if (next[p] >= 0) __builtin_prefetch(a.y + static_cast<size_t>(next[p]) * a.y_stride + j, 0, 3);
      if (row[p] < 0) continue;
      const Float y = load_partial_f(a.y + static_cast<size_t>(row[p]) * a.y_stride + j, count);
      sum = Vec::fma(Vec::set(weight[p * step]), y, sum);
    }
    if (poisoned) sum = Vec::set(std::numeric_limits<float>::quiet_NaN());
    store_partial(a.out, a.out_type, at, sum, count);
  }
}

inline void combine(const CombineArgs& args) {
  for (uint32_t t = 0; t < args.tokens; ++t) combine_token(args, t);
}
