// A node's share of a layer for inference: the base's steps as they are.
#pragma once

#include "moe/gemm_kernel.h"
#include "moe/moe_base.h"

namespace ktmoe {

template <class Kernel>
class AMX_MOE_TP : public AMX_MOE_BASE<Kernel, AMX_MOE_TP<Kernel>> {
 public:
  using AMX_MOE_BASE<Kernel, AMX_MOE_TP<Kernel>>::AMX_MOE_BASE;
};

}  // namespace ktmoe
