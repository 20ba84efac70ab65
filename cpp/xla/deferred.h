// Deferred experts in XLA's programs: what a layer leaves is known to the program by a number.
#pragma once

#include "xla/call.h"

namespace ktmoe::xla {

// See handlers.h.
void do_forward_deferred(Call& call);
void do_drain_deferred(Call& call);

}  // namespace ktmoe::xla
