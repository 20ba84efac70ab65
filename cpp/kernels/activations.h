// The activation functions of experts: which there are, in which forms and with which parameters. The
// reference states the formulas; the list is activations.inc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>

namespace ktmoe::kernels {

enum class ActivationKind : uint8_t {
#define KT_ACTIVATION(id, ...) id,
#include "kernels/activations.inc"
#undef KT_ACTIVATION
};

inline constexpr float kNoLimit = std::numeric_limits<float>::infinity();

// The activation function of an expert and its parameters; those that a function does not use are ignored.
struct Activation {
  ActivationKind kind = ActivationKind::kSilu;
  bool gated = true;
  float limit = kNoLimit;
  float alpha = 1, beta1 = 1, beta2 = 1;
};

enum class ActivationForms : uint8_t { kGated, kUngated, kGatedAndNot };

struct ActivationInfo {
  // Of the gated form; parameters without a value are not used.
  struct Parameters {
    std::optional<float> limit = {}, alpha = {}, beta1 = {}, beta2 = {};
  };

  ActivationKind kind;
  std::string_view name;
  ActivationForms forms;
  std::string_view config_key;
  Parameters parameters;

  constexpr bool has_gated() const { return forms != ActivationForms::kUngated; }
  constexpr bool has_ungated() const { return forms != ActivationForms::kGated; }
};

inline constexpr ActivationInfo kActivations[] = {
#define KT_ACTIVATION(id, name, forms, key, ...) \
  {ActivationKind::id, name, ActivationForms::forms, key, {__VA_ARGS__}},
#include "kernels/activations.inc"
#undef KT_ACTIVATION
};

constexpr const ActivationInfo& activation_info(ActivationKind kind) {
  return kActivations[static_cast<size_t>(kind)];
}

// With the parameters of the models that introduced it.
constexpr Activation default_activation(ActivationKind kind, bool gated = true) {
  Activation a{.kind = kind, .gated = gated};
  if (!gated) return a;
  const ActivationInfo::Parameters& given = activation_info(kind).parameters;
  a.limit = given.limit.value_or(a.limit), a.alpha = given.alpha.value_or(a.alpha);
  a.beta1 = given.beta1.value_or(a.beta1), a.beta2 = given.beta2.value_or(a.beta2);
  return a;
}

}  // namespace ktmoe::kernels
