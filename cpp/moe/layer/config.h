// The shape of an expert layer.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/contract.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

struct GeneralMOEConfig {
  int64_t expert_num = 0;           // E
  int64_t num_experts_per_tok = 0;  // P
  int64_t hidden_size = 0;          // H
  int64_t intermediate_size = 0;    // I
  int64_t layer_idx = 0;
  kernels::Activation activation;
  std::shared_ptr<WorkerPool> pool;
  int64_t group_size = 0;     // of weights that are quantised by groups; 0: the method's own
  bool scale_inputs = false;  // the routing weights scale what enters the experts, not what leaves them

  // Throws std::invalid_argument naming the first field that cannot be used.
  void validate() const;
};

}  // namespace ktmoe
