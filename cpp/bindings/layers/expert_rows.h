// Passes that do not sum what experts compute, in Python; the sums are bind_combine_rows().
#pragma once

#include "bindings/module.h"
#include "moe/layer/interface.h"

namespace ktmoe::bindings {

void bind_expert_rows(nb::class_<MoE_Interface>& layer);

}  // namespace ktmoe::bindings
