// Calls from XLA's programs on a GPU: their arrays are copied to the host and back in the program's stream.
#pragma once

#include "xla/call.h"

namespace ktmoe::xla {

// Puts an operation on the arrays of the call into its stream. An error that it meets there, when the call
// has long returned, is pending in the StreamSession: that of a later call, among others. Its results are
// NaN.
Error* enqueue(CallFrame* frame, const Operation& operation);

}  // namespace ktmoe::xla
