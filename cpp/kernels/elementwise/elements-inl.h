// Vectors of rows that may end anywhere and be of either float type, and the operands that are added to a
// product. Included inside a target's namespace, after math-inl.h.

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

KT_INLINE size_t size_of(FloatType type) { return type == FloatType::kBf16 ? sizeof(bf16) : sizeof(float); }

// Element `at` of an array of either type and those behind it, at most `count`.
KT_INLINE Float load_partial(const void* p, FloatType type, size_t at, size_t count) {
  if (type == FloatType::kBf16) return load_partial_bf16(static_cast<const bf16*>(p) + at, count);
  return load_partial_f(static_cast<const float*>(p) + at, count);
}

KT_INLINE void store_partial(void* p, FloatType type, size_t at, const Float& x, size_t count) {
  if (type == FloatType::kBf16) return store_partial_bf16(static_cast<bf16*>(p) + at, x, count);
  store_partial_f(static_cast<float*>(p) + at, x, count);
}

// C + scale L of blocks of the same layout; L null for zero.
KT_INLINE Float with_adapter(const float* c, const float* l, const Float& scale, size_t at) {
  const Float product = Vec::load_f(c + at);
  return l == nullptr ? product : Vec::fma(scale, Vec::load_f(l + at), product);
}
