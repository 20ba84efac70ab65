// The config of a layer that trains, as Python has it.
#pragma once

#include "bindings/convert/lora_arrays.h"

namespace ktmoe::bindings {

// With the arrays that the adapters of a layer begin as, which the layer copies when it is made.
struct SFTConfig : MOESFTConfig {
  std::array<nb::object, kNumLora> lora;  // None where zeros will do

  LoraHandles lora_handles() const;
};

void bind_sft_config(nb::module_& m);

}  // namespace ktmoe::bindings
