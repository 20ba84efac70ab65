#include "moe/layer/tp_moe.h"

#include "moe/layer/tp_moe_common-inl.h"

namespace ktmoe {

template class TP_MOE_Common<AMX_MOE_TP>;

}  // namespace ktmoe
