// The instruction sets that there are kernels for.
#pragma once

namespace ktmoe {

// In rising order of preference. Those on request run slowly and are used only when asked for
// (is_on_request).
enum class Isa {
#define KT_ISA(enumerator, name, platform, choice) enumerator,
#include "isa/isas.inc"
#undef KT_ISA
};

}  // namespace ktmoe
