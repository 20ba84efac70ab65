// Passes with adapters of the caller, who goes back through them in any order: autograd, compiled programs.
//
// A backward pass has all inputs of its forward pass. It uses the saved pass where that still is the layer's
// last, which the number tells, and repeats the forward pass otherwise: the bits are the same.
#pragma once

#include <cstdint>

#include "sft/interface.h"

namespace ktmoe {

// A number that no other pass of the process has had recently; never 0.
uint32_t next_pass_number();

// With a number above 0 the pass is saved under it, in the place of all that were saved before.
void forward_numbered(MoE_SFT_Interface& layer, const LoraSources& lora, const ForwardArgs& args,
                      uint32_t number);

// `forward` are the inputs of that pass; its output is not used.
void backward_numbered(MoE_SFT_Interface& layer, const LoraSources& lora, ForwardArgs forward,
                       uint32_t number, const BackwardArgs& args);

}  // namespace ktmoe
