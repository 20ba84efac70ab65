// The interface of an expert layer for training, beyond inference.
#pragma once

#include <array>
#include <memory>

#include "moe/layer/interface.h"
#include "sft/config.h"
#include "sft/lora.h"

namespace ktmoe {

// Where the gradients of one backward pass are written. Null for gradients of matrices that are not
// requested.
struct BackwardArgs {
  uint32_t num_tokens = 0;
  const bf16* grad_output = nullptr;  // dY [T, H]
  bf16* grad_input = nullptr;         // [T, H]
  // Instead of grad_input, where expert_rows were: the gradient of what entered each slot's expert, in the
  // order of slots. Where routing weights scale the inputs, they are not applied.
  float* grad_expert_rows = nullptr;               // [S, H] or null
  uint32_t num_expert_rows = 0;                    // S
  float* grad_weights = nullptr;                   // [T, P]
  std::array<float*, kNumLora> lora = {};          // [E, rows, columns] by checkpoint expert
  float *gate_proj = nullptr, *up_proj = nullptr;  // [E, I, H]
  float* down_proj = nullptr;                      // [E, H, I]
  bool accumulate = false;                         // add the gradients of matrices to the arrays
};

class TrainingCall;

class MoE_SFT_Interface : public MoE_Interface {
 public:
  virtual const MOESFTConfig& sft_config() const = 0;

  // Takes new values for some of the adapters' matrices.
  virtual void update_lora_weights(const LoraSources& sources) = 0;

  // Adapters for inference, which tokens name by number (ForwardArgs::adapters): the rank and scale are those
  // of a config that differs from sft_config() in them alone. Throws std::invalid_argument for a number that
  // is too large to be used in a plan.
  virtual void set_adapter(uint32_t number, const LoraSources& sources, const MOESFTConfig& config) = 0;
  // Frees it; tokens cannot name it any more. Does nothing where there is none.
  virtual void remove_adapter(uint32_t number) = 0;

  // The layer with its adapters. With `save`, dropout is applied and the values for backward() are saved.
  // Throws std::runtime_error when max_cache_depth passes are saved already. A caller may tag a saved pass
  // with an id above 0.
  virtual void forward_sft(const ForwardArgs& args, bool save, uint32_t caller_id = 0,
                           TrainingCall* call = nullptr) = 0;

  // Whether the pass that backward() would use has this caller_id, above 0, and this number of tokens.
  virtual bool is_last(uint32_t caller_id, uint32_t num_tokens) = 0;

  // Drops all saved forward passes; their memory is reused.
  virtual void forget_forwards() = 0;

  // Gradients of the last saved forward pass, which is then dropped. Throws std::runtime_error when there is
  // none, std::invalid_argument when it had another number of tokens. After an error the forward pass is
  // still saved.
  virtual void backward(const BackwardArgs& args, TrainingCall* call = nullptr) = 0;

  // A handle for one call of forward_sft() or backward() that can be revoked: the saved passes and the step
  // are then as before the call.
  virtual std::shared_ptr<TrainingCall> new_call() = 0;

  virtual size_t num_cached() const = 0;
  virtual size_t cache_bytes() const = 0;
  virtual void clear_cache() = 0;

  // Counts saved forward passes; part of the key of the dropout masks.
  virtual uint32_t step() const = 0;
  virtual void set_step(uint32_t step) = 0;
};

}  // namespace ktmoe
