// What a layer of experts that trains does beyond inference.
#pragma once

#include <array>
#include <memory>

#include "moe/layer/interface.h"
#include "sft/config.h"
#include "sft/lora.h"

namespace ktmoe {

// Where the gradients of one backward pass go; those of matrices are null when they are not asked for.
struct BackwardArgs {
  uint32_t num_tokens = 0;
  const bf16* grad_output = nullptr;               // dY [T, H]
  bf16* grad_input = nullptr;                      // [T, H]
  float* grad_weights = nullptr;                   // [T, P]
  std::array<float*, kNumLora> lora = {};          // [E, rows, columns] by checkpoint expert
  float *gate_proj = nullptr, *up_proj = nullptr;  // [E, I, H]
  float* down_proj = nullptr;                      // [E, H, I]
  bool accumulate = false;                         // add the gradients of matrices to what is there
};

class TrainingCall;

class MoE_SFT_Interface : public MoE_Interface {
 public:
  virtual const MOESFTConfig& sft_config() const = 0;

  // Takes new values for some of the adapters' matrices.
  virtual void update_lora_weights(const LoraSources& sources) = 0;

  // The layer with its adapters. With `save`, dropout acts and what backward() needs is kept. Throws
  // std::runtime_error when as many forwards wait as may. A forward that is kept may be given a number of its
  // caller's, above 0.
  virtual void forward_sft(const ForwardArgs& args, bool save, uint32_t caller_id = 0,
                           TrainingCall* call = nullptr) = 0;

  // Whether the forward that backward() would take has that number, above 0, and so many tokens.
  virtual bool is_last(uint32_t caller_id, uint32_t num_tokens) = 0;

  // Forgets all forwards that wait; their memory serves the next ones.
  virtual void forget_forwards() = 0;

  // Gradients of the last forward that waits, which is then gone. Throws std::runtime_error when none waits,
  // std::invalid_argument when it had another number of tokens. The forward of a pass that fails still waits.
  virtual void backward(const BackwardArgs& args, TrainingCall* call = nullptr) = 0;

  // A call for one of both, which may be taken back: then the forwards that wait, and the step, are as if it
  // had never been.
  virtual std::shared_ptr<TrainingCall> new_call() = 0;

  virtual size_t num_cached() const = 0;
  virtual size_t cache_bytes() const = 0;
  virtual void clear_cache() = 0;

  // The number of the next forward that is saved: it keys the dropout masks.
  virtual uint32_t step() const = 0;
  virtual void set_step(uint32_t step) = 0;
};

}  // namespace ktmoe
