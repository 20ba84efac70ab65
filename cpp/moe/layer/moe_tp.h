// A node's share of a layer for inference: the unchanged steps of the base.
#pragma once

#include "moe/layer/moe_base.h"

namespace ktmoe {

class AMX_MOE_TP;
extern template class AMX_MOE_BASE<AMX_MOE_TP>;

class AMX_MOE_TP : public AMX_MOE_BASE<AMX_MOE_TP> {
 public:
  using AMX_MOE_BASE<AMX_MOE_TP>::AMX_MOE_BASE;
};

}  // namespace ktmoe
