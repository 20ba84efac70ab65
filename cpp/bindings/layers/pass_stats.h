// What layers count and measure, in Python.
#pragma once

#include "bindings/module.h"
#include "moe/layer/interface.h"

namespace ktmoe::bindings {

void bind_pass_stats(nb::module_& m);
void bind_stats(nb::class_<MoE_Interface>& layer);

}  // namespace ktmoe::bindings
