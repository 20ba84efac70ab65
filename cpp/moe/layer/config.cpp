#include "moe/layer/config.h"

#include <string>

#include "core/error.h"

namespace ktmoe {
namespace {

void require_positive(const char* name, int64_t value) {
  constexpr int64_t kMax = int64_t{1} << 24;  // keeps every row and index of a layer within 32 bits
  if (value < 1 || value > kMax) throw_invalid(name, ": got ", value, ", expected 1 to ", kMax);
}

// Names of the activations that exist without a gate.
std::string ungated_activations() {
  std::string names;
  for (const kernels::ActivationInfo& info : kernels::kActivations)
    if (info.has_ungated()) names += str_cat(names.empty() ? "" : ", ", info.name);
  return names;
}

}  // namespace

void GeneralMOEConfig::validate() const {
  require_positive("expert_num", expert_num);
  require_positive("num_experts_per_tok", num_experts_per_tok);
  require_positive("hidden_size", hidden_size);
  require_positive("intermediate_size", intermediate_size);
  if (layer_idx < 0) throw_invalid("layer_idx: got ", layer_idx, ", expected 0 or more");
  if (pool == nullptr) throw_invalid("pool: got none, expected the backend_ of a CPUInfer");

  const kernels::ActivationInfo& info = kernels::activation_info(activation.kind);
  if (activation.gated && !info.has_gated())
    throw_invalid("activation: got ", info.name, " with a gate, expected gated=False");
  if (!activation.gated && !info.has_ungated())
    throw_invalid("activation: got ", info.name, " without a gate, expected one of ", ungated_activations());
  if (!(activation.limit > 0))
    throw_invalid("activation: got limit ", activation.limit, ", expected above 0");
  if (!(activation.beta1 > 0) || !(activation.beta2 > 0))
    throw_invalid("activation: got beta1 ", activation.beta1, ", beta2 ", activation.beta2,
                  ", expected both above 0");
}

}  // namespace ktmoe
