// The arrays of a backward pass, checked, and the arguments made of them.
#pragma once

#include "bindings/convert/forward_arrays.h"
#include "bindings/convert/lora_arrays.h"
#include "sft/interface.h"

namespace ktmoe::bindings {

class GradientArrays {
 public:
  // The gradient of the output, and those of the rows; TypeError and ValueError for invalid ones.
  GradientArrays(const MOESFTConfig& config, nb::handle grad_output, nb::handle grad_input,
                 nb::handle grad_weights, Output output = Output::kSums);

  // Where gradients of matrices are written; None for those that are not computed.
  void write_lora(const LoraHandles& handles);
  void write_projections(nb::handle gate, nb::handle up, nb::handle down);

  BackwardArgs& args() { return args_; }
  Arrays take() { return std::move(arrays_); }

 private:
  // Null for None.
  template <class T>
  T* write_if_given(nb::handle target, const char* name, DType dtype, const Dims& shape, bool of_up = false);
  // Shares memory with none of those before.
  template <class T>
  T* write(nb::handle target, const char* name, DType dtype, const Dims& shape);

  const MOESFTConfig& config_;
  Arrays arrays_;
  BackwardArgs args_;
};

}  // namespace ktmoe::bindings
