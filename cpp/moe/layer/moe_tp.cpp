#include "moe/layer/moe_tp.h"

#include "moe/layer/moe_base-inl.h"

namespace ktmoe {

template class AMX_MOE_BASE<AMX_MOE_TP>;

}  // namespace ktmoe
