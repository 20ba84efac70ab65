// The task that writes slices of an expert to Python arrays.
#pragma once

#include <memory>

#include "bindings/module.h"
#include "moe/layer/interface.h"

namespace ktmoe::bindings {

// Adds it to the class.
void bind_expert_slices(nb::class_<MoE_Interface>& layer);

}  // namespace ktmoe::bindings
