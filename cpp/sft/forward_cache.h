// What the backward pass needs of a forward pass.
#pragma once

#include <memory>

#include "core/aligned_buffer.h"
#include "kernels/contract.h"
#include "moe/plan/routing_plan.h"
#include "sft/config.h"
#include "sft/lora.h"

namespace ktmoe {

// Rows are those of the routing plan: the tokens of an expert, one after the other. The memory is the cache's
// own or, for rows that are not kept (CachedRows), borrowed for as long as they are needed.
struct CachedRows {
  kernels::KeptRows kept;     // g, u, h [rows, I]
  bf16* lora_hidden[3] = {};  // ug, uu, ud [rows, R]: bf(x A^T) of gate, up, down
};

struct ForwardCache {
  uint32_t num_tokens = 0;
  uint64_t id = 0;         // of all saved by the layer, in their order
  uint32_t caller_id = 0;  // chosen by the caller; 0: none
  uint32_t step = 0;       // of the dropout masks
  RoutingPlan plan;
  std::shared_ptr<const LoraWeights> lora;
  bf16* hidden = nullptr;         // x [T, H]; a token that is not finite is all NaN
  float* row_weight = nullptr;    // [rows]: what each counts in its token's sum
  float* input_weight = nullptr;  // [T, P]: what scales the inputs, of a layer that does; else null
  uint8_t* mask_x = nullptr;      // [T, mask_row_bytes(H)]: what dropout keeps; null without
  uint8_t* mask_h = nullptr;      // [T, mask_row_bytes(I)]
  CachedRows rows;
  bool is_overwritten = false;  // the rows, by a backward pass; a forward pass on `hidden` makes them again
  AlignedBuffer memory;
};

}  // namespace ktmoe
