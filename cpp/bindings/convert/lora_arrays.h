// The adapters of a layer as Python passes and receives them: names, shapes, and arrays that are read.
#pragma once

#include <array>

#include "bindings/convert/forward_arrays.h"
#include "sft/lora.h"

namespace ktmoe::bindings {

using LoraHandles = std::array<nb::handle, kNumLora>;  // in the order of LoraId

Dims lora_dims(const MOESFTConfig& config, size_t id);
const char* lora_name(const MOESFTConfig& config, size_t id);

// ValueError for a matrix of up where the activation has no gate.
void check_lora_exists(const MOESFTConfig& config, const char* name, bool is_up);
bool is_up_lora(size_t id);

// The matrices that are not None, checked; TypeError and ValueError for invalid ones. The
// owners keep their memory alive.
LoraSources read_lora(const MOESFTConfig& config, const LoraHandles& handles, Arrays& owners);

}  // namespace ktmoe::bindings
