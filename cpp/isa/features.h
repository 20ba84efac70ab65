// What this processor can do and the operating system lets it do, asked once.
#pragma once

namespace ktmoe {

// The instruction sets of isas.inc: whether the processor has what each takes, and the system lets it be
// used.
struct CpuFeatures {
  enum class Platform { any, x86_64 };
#define KT_ISA(enumerator, name, platform, choice) bool name = Platform::platform == Platform::any;
#include "isa/isas.inc"
#undef KT_ISA
};

// The features of the machine this runs on. The first call asks the kernel for permission to use AMX tiles.
const CpuFeatures& cpu_features();

}  // namespace ktmoe
