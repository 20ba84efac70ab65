// The end of a layer: a token's experts are added in slot order in fp32 and rounded once.
// Included inside a target's namespace, after the policy.

KT_INLINE void store_partial_bf16(bf16* p, const Float& x, size_t count) {
  if (count >= Vec::kWidth) return Vec::store_bf16(p, x);
  bf16 full[Vec::kWidth];
  Vec::store_bf16(full, x);
  std::memcpy(p, full, count * sizeof(bf16));
}

KT_INLINE void store_partial_f(float* p, const Float& x, size_t count) {
  if (count >= Vec::kWidth) return Vec::store_f(p, x);
  float full[Vec::kWidth];
  Vec::store_f(full, x);
  std::memcpy(p, full, count * sizeof(float));
}

KT_INLINE Float load_partial_f(const float* p, size_t count) {
  if (count >= Vec::kWidth) return Vec::load_f(p);
  float full[Vec::kWidth] = {};
  std::memcpy(full, p, count * sizeof(float));
  return Vec::load_f(full);
}

KT_INLINE Float load_partial_bf16(const bf16* p, size_t count) {
  if (count >= Vec::kWidth) return Vec::load_bf16(p);
  bf16 full[Vec::kWidth] = {};
  std::memcpy(full, p, count * sizeof(bf16));
  return Vec::load_bf16(full);
}

// Whether all values of a row are finite; an exponent of ones is what is not.
inline bool row_is_finite(const bf16* row, size_t count) {
  uint32_t bad = 0;
  for (size_t i = 0; i < count; ++i) bad |= (row[i].bits & 0x7f80u) == 0x7f80u;
  return bad == 0;
}

KT_INLINE Float load_base(const CombineArgs& a, size_t at, size_t count) {
  if (a.base == nullptr) return Vec::set(0.0f);
  if (a.base_type == FloatType::kBf16) return load_partial_bf16(static_cast<const bf16*>(a.base) + at, count);
  return load_partial_f(static_cast<const float*>(a.base) + at, count);
}

// The rows of the token behind are asked for meanwhile: other cores wrote them, in no order.
inline void combine_token(const CombineArgs& a, uint32_t t) {
  const int32_t* row = a.row + size_t{t} * a.slots;
  const int32_t* next = t + 1 < a.tokens ? row + a.slots : row;
  const float* weight = a.weights + size_t{t} * a.slots;
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
      sum = Vec::fma(Vec::set(weight[p]), y, sum);
    }
    if (poisoned) sum = Vec::set(std::numeric_limits<float>::quiet_NaN());
    if (a.out_type == FloatType::kBf16) {
      store_partial_bf16(static_cast<bf16*>(a.out) + at, sum, count);
    } else {
      store_partial_f(static_cast<float*>(a.out) + at, sum, count);
    }
  }
}

inline void combine_rows(const CombineArgs& args) {
  for (uint32_t t = 0; t < args.tokens; ++t) combine_token(args, t);
}
