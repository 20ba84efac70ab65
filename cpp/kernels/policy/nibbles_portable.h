// 32 packed nibbles that are to be looked up: here they are unpacked at once. Included inside a target's
// namespace, after its bytes.
#include "kernels/policy/nibbles.h"

using PackedNibbles = PlainNibbles;
