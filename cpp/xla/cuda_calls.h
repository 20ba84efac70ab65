// Calls from XLA's programs on a GPU: their arrays are copied to the host and back in the program's stream.
#pragma once

#include "xla/call.h"

namespace ktmoe::xla {

// Puts an operation on the arrays of the call into its stream. An error that it meets there, when the call
// has long returned, is that of a later call or of rethrow_error; its results are NaN.
Error* enqueue(CallFrame* frame, const Operation& operation);

// Throws the first error since the last time.
void rethrow_error();

}  // namespace ktmoe::xla
