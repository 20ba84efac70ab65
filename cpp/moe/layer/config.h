// The shape of an expert layer.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/contract.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// What products take activations in. Default: of a config, as the method has it; of a call, as the layer.
enum class ActivationDtype : uint8_t { kDefault, kBf16, kInt8 };

struct GeneralMOEConfig {
  int64_t expert_num = 0;           // E
  int64_t num_experts_per_tok = 0;  // P
  int64_t hidden_size = 0;          // H
  int64_t intermediate_size = 0;    // I
  int64_t layer_idx = 0;
  kernels::Activation activation;
  std::shared_ptr<WorkerPool> pool;
  int64_t group_size = 0;  // of weights that are quantized by groups; 0: the method's default
  ActivationDtype activation_dtype = ActivationDtype::kDefault;
  bool scale_inputs = false;  // routing weights scale the experts' inputs, not their outputs

  // Throws std::invalid_argument naming the first invalid field.
  void validate() const;
};

}  // namespace ktmoe
