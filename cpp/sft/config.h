// The config of an expert layer for training: its adapters, and how much of a forward pass is saved.
#pragma once

#include "moe/layer/config.h"

namespace ktmoe {

struct MOESFTConfig : GeneralMOEConfig {
  int64_t lora_rank = 16;  // R; 0: no adapters
  double lora_alpha = 32.0;
  double lora_dropout = 0;      // probability that an adapter's input element is dropped
  uint64_t seed = 0;            // of the dropout masks
  int64_t max_cache_depth = 1;  // saved forward passes at most
  bool recompute = false;       // save input and routing only, repeat the forward pass in backward
  bool cache_float32 = false;   // save gate and up in float32 rather than bf16

  // s = lora_alpha / R, over 1 - lora_dropout where dropout acts, rounded once; 0 without adapters.
  float lora_scale(bool drops) const;

  // Throws std::invalid_argument naming the first invalid field.
  void validate() const;
};

}  // namespace ktmoe
