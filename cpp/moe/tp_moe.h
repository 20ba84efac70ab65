// A layer of experts for inference, over all sub-pools of an engine.
#pragma once

#include "moe/moe_tp.h"
#include "moe/tp_moe_common.h"

namespace ktmoe {

template <class Part>
class TP_MOE final : public TP_MOE_Common<Part> {
 public:
  using TP_MOE_Common<Part>::TP_MOE_Common;
};

}  // namespace ktmoe
