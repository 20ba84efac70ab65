// The derivatives of the activation functions, from what reaches the intermediate to what reaches gate and
// up. Included inside a target's namespace, after activation-inl.h.
//
// Every activation is a product A(g) B(u), so its derivatives are A'(g) B(u) and A(g) B'(u). Arguments are
// clipped where the factor beside them has become zero: nothing finite turns into NaN, and a NaN passes.

struct FactorAndSlope {
  Float factor, slope;
};

// sigmoid(x) and sigmoid(-x), by one exponential that cannot overflow and without a difference that cancels.
struct Logistic {
  Float up, down;
};
KT_INLINE Logistic logistic(const Float& x) {
  const Float zero = Vec::set(0.0f), one = Vec::set(1.0f);
  const Float small = exp_f(Vec::sub(zero, Vec::abs(x)));
  const Float large_half = Vec::div(one, Vec::add(one, small)), small_half = Vec::mul(small, large_half);
  const Vec::Mask negative = Vec::less(x, zero);
  return {Vec::select(negative, small_half, large_half), Vec::select(negative, large_half, small_half)};
}

// d/dx of x sigmoid(x), of which s is the sigmoid.
KT_INLINE Float silu_slope(const Float& x, const Logistic& s) {
  return Vec::mul(s.up, Vec::fma(x, s.down, Vec::set(1.0f)));
}

// sech(x)^2
KT_INLINE Float sech_squared(const Float& x) {
  const Logistic s = logistic(Vec::add(x, x));
  return Vec::mul(Vec::mul(Vec::set(4.0f), s.up), s.down);
}

// x sigmoid(alpha x) without a limit.
KT_INLINE FactorAndSlope silu_and_slope(const Float& x, float alpha) {
  const Float clipped = clip(Vec::mul(Vec::set(alpha), x), 800.0f);
  const Logistic s = logistic(clipped);
  return {Vec::mul(x, s.up), silu_slope(clipped, s)};
}

KT_INLINE FactorAndSlope gelu_and_slope(const Float& g) {
  const Float x = clip(g, 40.0f), cdf = normal_cdf(x);
  const Float bell = exp_f(Vec::mul(Vec::mul(x, x), Vec::set(-0.5f)));
  const Float density = Vec::mul(Vec::set(0.39894228f), bell);
  return {Vec::mul(g, cdf), Vec::fma(x, density, cdf)};
}

// z = sqrt(8 / pi) (x + 0.044715 x^3), see gelu_tanh_f.
KT_INLINE FactorAndSlope gelu_tanh_and_slope(const Float& g) {
  const Float x = clip(g, 30.0f), square = Vec::mul(x, x), scale = Vec::set(1.59576912f);
  const Float cubic = Vec::fma(Vec::mul(square, Vec::set(0.044715f)), x, x);
  const Float z_slope = Vec::mul(scale, Vec::fma(square, Vec::set(3 * 0.044715f), Vec::set(1.0f)));
  const Logistic s = logistic(Vec::mul(cubic, scale));
  return {Vec::mul(g, s.up), silu_slope(Vec::mul(x, z_slope), s)};
}

KT_INLINE FactorAndSlope situ_gate_and_slope(const Float& g, float beta) {
  const Logistic s = logistic(g);
  const Float soft = soft_limit(g, beta), steep = sech_squared(Vec::div(g, Vec::set(beta)));
  return {Vec::mul(soft, s.up), Vec::mul(s.up, Vec::fma(soft, s.down, steep))};
}

// 1 above 0 and 0 from there on, or the NaN that g is.
KT_INLINE FactorAndSlope relu_and_slope(const Float& g) {
  const Float zero = Vec::set(0.0f), positive = relu_f(g);
  return {positive, Vec::select(Vec::less(zero, g), Vec::set(1.0f), Vec::clamp_above(positive, zero))};
}

// `slope`, but 0 where x is above the limit.
KT_INLINE Float slope_below(const Float& x, float limit, const Float& slope) {
  return Vec::select(Vec::less(Vec::set(limit), x), Vec::set(0.0f), slope);
}

template <class Map>
KT_INLINE FactorAndSlope gate_and_slope(const Activation& a, const Float& g) {
  if constexpr (Map::kKind == ActivationKind::kRelu2) {
    const Float positive = Vec::clamp_below(g, Vec::set(0.0f));
    return {Vec::mul(positive, positive), Vec::add(positive, positive)};
  } else if constexpr (Map::kKind == ActivationKind::kGelu) {
    return gelu_and_slope(g);
  } else if constexpr (Map::kKind == ActivationKind::kGeluTanh) {
    return gelu_tanh_and_slope(g);
  } else if constexpr (Map::kKind == ActivationKind::kSitu) {
    return situ_gate_and_slope(g, a.beta1);
  } else if constexpr (Map::kKind == ActivationKind::kRelu) {
    return relu_and_slope(g);
  } else if constexpr (!Map::kGated) {
    static_assert(Map::kKind == ActivationKind::kSilu);
    return silu_and_slope(g, 1.0f);
  } else if constexpr (Map::kKind == ActivationKind::kSwigluStep) {
    const FactorAndSlope silu = silu_and_slope(g, 1.0f);
    return {Vec::clamp_above(silu.factor, Vec::set(a.limit)), slope_below(silu.factor, a.limit, silu.slope)};
  } else {
    static_assert(Map::kKind == ActivationKind::kSilu || Map::kKind == ActivationKind::kSwigluOai);
    const float alpha = Map::kKind == ActivationKind::kSwigluOai ? a.alpha : 1.0f;
    const FactorAndSlope silu = silu_and_slope(Vec::clamp_above(g, Vec::set(a.limit)), alpha);
    return {silu.factor, slope_below(g, a.limit, silu.slope)};
  }
}

template <class Map>
KT_INLINE FactorAndSlope up_and_slope(const Activation& a, const Float& u) {
  constexpr ActivationKind kKind = Map::kKind;
  const Float factor = up_factor<kKind>(a, u);
  if constexpr (kKind == ActivationKind::kSitu) {
    return {factor, sech_squared(Vec::div(u, Vec::set(a.beta2)))};
  } else {
    // 1, or the NaN that u is
    const Float one = Vec::clamp_above(Vec::clamp_below(u, Vec::set(1.0f)), Vec::set(1.0f));
    constexpr bool kLimited = activation_info(kKind).parameters.limit.has_value();
    return {factor, kLimited ? slope_below(Vec::abs(u), a.limit, one) : one};
  }
}

template <class Map>
struct ActivateBackward {
  static_assert(kOutputBlock % Vec::kWidth == 0);

  static void run(const ActivateBackwardArgs& a) {
    for (uint32_t m = 0; m < a.m; ++m) {
      if (m + kAhead < a.m) prefetch_kept(a, m + kAhead);
      float* sums = a.grad_weight + m * a.grad_weight_stride;
      for (size_t j0 = 0; j0 < a.n; j0 += kOutputBlock) {
        const size_t end = a.n - j0 < kOutputBlock ? a.n : j0 + kOutputBlock;
        Float sum = Vec::set(0.0f);
        for (size_t j = j0; j < end; j += Vec::kWidth) sum = step(a, m, j, sum);
        *sums++ = Vec::sum(sum);
      }
    }
  }

  // A row is a few cache lines of three matrices, far from the next (Emerald Rapids: 8 % of the backward pass
  // with 256 rows).
  static constexpr uint32_t kAhead = 4;
  static KT_INLINE void prefetch_kept(const ActivateBackwardArgs& a, uint32_t m) {
    const size_t at = m * a.kept.stride, size = size_of(a.kept.type);
    const auto* gate = static_cast<const std::byte*>(a.kept.gate) + at * size;
    const auto* up = static_cast<const std::byte*>(a.kept.up ? a.kept.up : a.kept.gate) + at * size;
    const auto* h = reinterpret_cast<const std::byte*>(a.kept.h + at);
    for (size_t i = 0; i < a.n * size; i += kCacheLine) {
      __builtin_prefetch(gate + i, 1, 3);
      __builtin_prefetch(up + i, 1, 3);
    }
    for (size_t i = 0; i < a.n * sizeof(bf16); i += kCacheLine) __builtin_prefetch(h + i, 0, 3);
  }

  // One vector of a row: gives `sum` with z h added.
  static KT_INLINE Float step(const ActivateBackwardArgs& a, uint32_t m, size_t j, const Float& sum) {
    const size_t left = a.n - j, at_z = m * a.z_stride + j, at = m * a.kept.stride + j;
    const size_t at_d = m * a.d_stride + j;
    Float z = load_partial_f(a.z + at_z, left);
    if (a.l) z = Vec::fma(Vec::set(a.lora_scale), load_partial_f(a.l + at_z, left), z);
    const Float dh = Vec::mul(Vec::set(a.weight[m]), z);
    const FactorAndSlope gate =
        gate_and_slope<Map>(a.activation, load_partial(a.kept.gate, a.kept.type, at, left));
    if constexpr (Map::kGated) {
      const FactorAndSlope up =
          up_and_slope<Map>(a.activation, load_partial(a.kept.up, a.kept.type, at, left));
      store_partial_bf16(a.d_gate + at_d, Vec::mul(dh, Vec::mul(gate.slope, up.factor)), left);
      store_partial_bf16(a.d_up + at_d, Vec::mul(dh, Vec::mul(gate.factor, up.slope)), left);
    } else {
      store_partial_bf16(a.d_gate + at_d, Vec::mul(dh, gate.slope), left);
    }
    return Vec::fma(z, load_partial_bf16(a.kept.h + at, left), sum);
  }
};

inline void activate_backward(const ActivateBackwardArgs& args) { for_activation<ActivateBackward>(args); }
