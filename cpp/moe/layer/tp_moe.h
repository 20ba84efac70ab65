// A layer of experts for inference, over all sub-pools of an engine.
#pragma once

#include "moe/layer/moe_tp.h"
#include "moe/layer/tp_moe_common.h"

namespace ktmoe {

extern template class TP_MOE_Common<AMX_MOE_TP>;

class TP_MOE : public TP_MOE_Common<AMX_MOE_TP> {
 public:
  using TP_MOE_Common<AMX_MOE_TP>::TP_MOE_Common;
};

}  // namespace ktmoe
