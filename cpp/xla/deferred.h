// Deferred experts in XLA programs: a program refers to a deferred output by its number.
#pragma once

#include "xla/call.h"

namespace ktmoe::xla {

// See handlers.h.
void do_forward_deferred(Call& call);
void do_drain_deferred(Call& call);

}  // namespace ktmoe::xla
