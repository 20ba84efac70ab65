#include "sft/config.h"

#include <cmath>

#include "core/error.h"

namespace ktmoe {

float MOESFTConfig::lora_scale(bool drops) const {
  if (lora_rank == 0) return 0;
  return static_cast<float>(lora_alpha / static_cast<double>(lora_rank) / (drops ? 1 - lora_dropout : 1.0));
}

void MOESFTConfig::validate() const {
  constexpr int64_t kMaxRank = 4096, kMaxDepth = 1 << 20;
  GeneralMOEConfig::validate();
  if (lora_rank < 0 || lora_rank > kMaxRank)
    throw_invalid("lora_rank: got ", lora_rank, ", expected 0 to ", kMaxRank);
  if (!std::isfinite(lora_alpha)) throw_invalid("lora_alpha: got ", lora_alpha, ", expected a finite number");
  if (!(lora_dropout >= 0 && lora_dropout < 1))
    throw_invalid("lora_dropout: got ", lora_dropout, ", expected at least 0 and below 1");
  if (!std::isfinite(lora_scale(true)))
    throw_invalid("lora_alpha: got ", lora_alpha,
                  ", expected less: the scale of the adapters overflows float32");
  if (max_cache_depth < 1 || max_cache_depth > kMaxDepth)
    throw_invalid("max_cache_depth: got ", max_cache_depth, ", expected 1 to ", kMaxDepth);
  constexpr int64_t kMaxLayers = int64_t{1} << 31;  // the counter of dropout masks has 31 bits for the layer
  if (layer_idx >= kMaxLayers) throw_invalid("layer_idx: got ", layer_idx, ", expected below ", kMaxLayers);
}

}  // namespace ktmoe
