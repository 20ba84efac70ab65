// What a forward pass saves for its backward pass.
#pragma once

#include <memory>

#include "core/aligned_buffer.h"
#include "kernels/contract.h"
#include "moe/layer/config.h"
#include "moe/plan/routing_plan.h"
#include "sft/config.h"
#include "sft/lora.h"

namespace ktmoe {

// Rows are those of the routing plan, grouped by expert. The memory belongs to the cache or, for rows that
// are not saved, is borrowed while they are needed.
struct CachedRows {
  kernels::KeptRows kept;     // g, u, h [rows, I]
  bf16* lora_hidden[3] = {};  // ug, uu, ud [rows, R]: bf(x A^T) of gate, up, down
};

struct ForwardCache {
  uint32_t num_tokens = 0;
  uint64_t id = 0;         // increasing, unique within the layer
  uint32_t caller_id = 0;  // chosen by the caller; 0: none
  uint32_t step = 0;       // of the dropout masks
  ActivationDtype activation_dtype = ActivationDtype::kDefault;
  RoutingPlan plan;
  std::shared_ptr<const LoraWeights> lora;
  bf16* hidden = nullptr;         // x [T, H]; a token that is not finite is all NaN
  float* row_weight = nullptr;    // [rows]: the factor of each in its token's sum
  float* input_weight = nullptr;  // [T, P]: factors of scaled inputs; null where inputs are not scaled
  uint8_t* mask_x = nullptr;      // [T, mask_row_bytes(H)]: what dropout keeps; null without
  uint8_t* mask_h = nullptr;      // [T, mask_row_bytes(I)]
  CachedRows rows;
  bool is_overwritten = false;  // rows lost to a failed backward pass; repeating forward restores them
  AlignedBuffer memory;
};

}  // namespace ktmoe
