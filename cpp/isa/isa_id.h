// The instruction sets that there are kernels for.
#pragma once

namespace ktmoe {

// In rising order of preference. amx_emu runs anywhere, slowly, and is used only when asked for.
enum class Isa {
#define KT_ISA(enumerator, name, platform, choice) enumerator,
#include "isa/isas.inc"
#undef KT_ISA
};

}  // namespace ktmoe
