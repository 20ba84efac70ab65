// The activation functions of SwiGLU-like experts on vectors: act(gate, up) in fp32, no rounding.
// Formulas: silu(g) = g sigmoid(g); the reference module states them all side by side.
// Included inside a target's namespace, after math-inl.h.

KT_INLINE Float silu_f(const Float& g) { return Vec::mul(g, sigmoid(g)); }

// 0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))), as g times a sigmoid: the same function, and exact in the
// tail.
KT_INLINE Float gelu_tanh_f(const Float& g) {
  const Float cubic = Vec::fma(Vec::mul(Vec::mul(g, g), Vec::set(0.044715f)), g, g);
  return Vec::mul(g, sigmoid(Vec::mul(cubic, Vec::set(1.59576912f))));
}

KT_INLINE Float relu_f(const Float& g) { return Vec::clamp_below(g, Vec::set(0.0f)); }

// b tanh(x / b)
KT_INLINE Float soft_limit(const Float& x, float b) {
  return Vec::mul(Vec::set(b), tanh_f(Vec::div(x, Vec::set(b))));
}

KT_INLINE Float clip(const Float& x, float limit) {
  return Vec::clamp_above(Vec::clamp_below(x, Vec::set(-limit)), Vec::set(limit));
}

// What depends on the gate: every activation is the product of this and a factor of up.
template <ActivationKind kKind>
KT_INLINE Float gate_factor(const Activation& a, const Float& g) {
  if constexpr (kKind == ActivationKind::kSilu) {
    return silu_f(Vec::clamp_above(g, Vec::set(a.limit)));
  } else if constexpr (kKind == ActivationKind::kSwigluOai) {
    const Float limited = Vec::clamp_above(g, Vec::set(a.limit));
    return Vec::mul(limited, sigmoid(Vec::mul(limited, Vec::set(a.alpha))));
  } else if constexpr (kKind == ActivationKind::kSwigluStep) {
    return Vec::clamp_above(silu_f(g), Vec::set(a.limit));
  } else if constexpr (kKind == ActivationKind::kGelu) {
    return Vec::mul(g, normal_cdf(g));
  } else if constexpr (kKind == ActivationKind::kGeluTanh) {
    return gelu_tanh_f(g);
  } else if constexpr (kKind == ActivationKind::kRelu) {
    return relu_f(g);
  } else {
    static_assert(kKind == ActivationKind::kSitu);
    return Vec::mul(soft_limit(g, a.beta1), sigmoid(g));
  }
}

template <ActivationKind kKind>
KT_INLINE Float up_factor(const Activation& a, const Float& u) {
  if constexpr (kKind == ActivationKind::kSilu || kKind == ActivationKind::kSwigluStep) {
    return clip(u, a.limit);
  } else if constexpr (kKind == ActivationKind::kSwigluOai) {
    return Vec::add(clip(u, a.limit), Vec::set(1.0f));
  } else if constexpr (kKind == ActivationKind::kSitu) {
    return soft_limit(u, a.beta2);
  } else {
    static_assert(kKind == ActivationKind::kGelu || kKind == ActivationKind::kGeluTanh ||
                  kKind == ActivationKind::kRelu);
    return u;
  }
}

template <ActivationKind kKind>
KT_INLINE Float ungated(const Float& g) {
  if constexpr (kKind == ActivationKind::kSilu) {
    return silu_f(g);
  } else if constexpr (kKind == ActivationKind::kGeluTanh) {
    return gelu_tanh_f(g);
  } else if constexpr (kKind == ActivationKind::kRelu) {
    return relu_f(g);
  } else {
    static_assert(kKind == ActivationKind::kRelu2);
    const Float positive = Vec::clamp_below(g, Vec::set(0.0f));
    return Vec::mul(positive, positive);
  }
}

// How one activation maps vectors of gate and up; `u` is ignored when not gated.
template <ActivationKind kActivation, bool kHasUp>
struct ActivationMap {
  static constexpr ActivationKind kKind = kActivation;
  static constexpr bool kGated = kHasUp;
  static KT_INLINE Float apply(const Activation& a, const Float& g, const Float& u) {
    if constexpr (kGated) {
      return Vec::mul(gate_factor<kKind>(a, g), up_factor<kKind>(a, u));
    } else {
      return ungated<kKind>(g);
    }
  }
};

// Runs Panel<Map>::run(args) for the form that args names, when the activation has it.
template <template <class> class Panel, ActivationKind kKind, class Args>
void for_form(const Args& args) {
  if (args.activation.gated) {
    if constexpr (activation_info(kKind).has_gated()) Panel<ActivationMap<kKind, true>>::run(args);
  } else {
    if constexpr (activation_info(kKind).has_ungated()) Panel<ActivationMap<kKind, false>>::run(args);
  }
}

// The same for the activation that args names: one branch per panel.
template <template <class> class Panel, class Args>
void for_activation(const Args& args) {
  switch (args.activation.kind) {
#define KT_ACTIVATION(id, ...) \
  case ActivationKind::id: return for_form<Panel, ActivationKind::id>(args);
#include "kernels/activations.inc"
#undef KT_ACTIVATION
  }
}

// Inference without adapters: the intermediate is the only output.
inline bool is_plain(const ActivateArgs& a) {
  const KeptRows& kept = a.kept;
  return a.l_gate == nullptr && a.l_up == nullptr && kept.gate == nullptr && kept.up == nullptr &&
         kept.h == nullptr && a.h.data != nullptr;
}
