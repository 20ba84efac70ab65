// The interface of an expert layer, for any weight format and any number of NUMA nodes.
#pragma once

#include <cstdint>

#include "moe/layer/config.h"
#include "moe/layer/gemm_kernel.h"
#include "moe/layer/pass_stats.h"
#include "moe/weights/expert_slices.h"
#include "moe/weights/expert_weights.h"

namespace ktmoe {

// One forward pass of the routed experts. All arrays are contiguous and owned by the caller.
struct ForwardArgs {
  uint32_t num_tokens = 0;                // T
  const bf16* hidden_states = nullptr;    // [T, H]
  const int64_t* topk_ids = nullptr;      // [T, P]
  const float* topk_weights = nullptr;    // [T, P]
  const uint8_t* skip_experts = nullptr;  // [E] or null: experts that are computed elsewhere
  const void* base = nullptr;             // [T, H] or null: added to the result; may be `out`
  kernels::FloatType base_type = kernels::FloatType::kFloat32;
  void* out = nullptr;  // [T, H]
  kernels::FloatType out_type = kernels::FloatType::kBf16;
  ActivationDtype activation_dtype = ActivationDtype::kDefault;
  const int32_t* adapters = nullptr;  // [T] or null: the adapter of each token, negative for none
  // Of a call that is computed in several passes: stats count it, and its tokens, once.
  bool is_later_chunk = false;
  bool is_deferred_part = false;
  // Slots that are summed separately, of a batch with split slots; or null.
  const int64_t* deferred_ids = nullptr;  // [T, P], negative where topk_ids has an id
  float* deferred_out = nullptr;          // [T, H]
  // Where the experts' rows go instead of being summed in `out`: one for each slot that is not skipped, in
  // the order of slots. combine_rows() sums them elsewhere.
  float* expert_rows = nullptr;  // [S, H] or null
  uint32_t num_expert_rows = 0;  // S
};

class MoE_Interface {
 public:
  MoE_Interface() = default;
  virtual ~MoE_Interface() = default;
  MoE_Interface(const MoE_Interface&) = delete;
  MoE_Interface& operator=(const MoE_Interface&) = delete;

  virtual const GeneralMOEConfig& config() const = 0;
  virtual const GemmKernel& kernel() const = 0;
  virtual bool loaded() const = 0;

  // Takes the weights. `weights` then has those that the layer had before, for the caller to release.
  // Throws std::invalid_argument when the numbers of matrices or biases do not fit the config.
  virtual void load_weights(ExpertWeights& weights) = 0;

  // out = base + sum of the experts' outputs, weighted by slot unless the weights scale the inputs. Throws
  // std::out_of_range for an expert id of expert_num or above, std::invalid_argument for another number of
  // expert_rows than slots, std::runtime_error when nothing is loaded; `out` is then as it was.
  virtual void forward(const ForwardArgs& args) = 0;

  // Throws std::runtime_error when nothing is loaded. Does not wait for a running call.
  virtual ProjectionFormats formats() const = 0;

  // Throws std::invalid_argument for an activation dtype that the layer's products cannot have.
  virtual void check_activation_dtype(ActivationDtype dtype) const = 0;

  // Starts or stops counting and measuring passes; starting begins at zero. Waits for a running call.
  virtual void collect_stats(bool on) = 0;
  virtual bool collects_stats() const = 0;
  // Those of the passes since then, or since the last reset. Waits for a running call; throws
  // std::runtime_error when none are collected.
  virtual PassStats stats(bool reset) = 0;

  // Writes an expert to the slices' arrays. Throws std::runtime_error when the layer has no weights, or
  // weights of other formats than the slices.
  virtual void write_expert(const ExpertSlices& slices) = 0;
};

}  // namespace ktmoe
