// The config of a layer for training in Python.
#pragma once

#include "bindings/convert/lora_arrays.h"

namespace ktmoe::bindings {

// With the initial adapters, which a layer copies when it is created.
struct SFTConfig : MOESFTConfig {
  std::array<nb::object, kNumLora> lora;  // None for zeros

  LoraHandles lora_handles() const;
};

void bind_sft_config(nb::module_& m);

}  // namespace ktmoe::bindings
