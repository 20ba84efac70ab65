// Features of this processor that the operating system enables, read once.
#pragma once

namespace ktmoe {

// The instruction sets of isas.inc: whether the processor and the operating system support each.
struct CpuFeatures {
  enum class Platform { any, x86_64 };
#define KT_ISA(enumerator, name, platform, choice) bool name = Platform::platform == Platform::any;
#include "isa/isas.inc"
#undef KT_ISA
};

// The features of the machine this runs on. The first call requests permission from the kernel to use AMX
// tiles.
const CpuFeatures& cpu_features();

}  // namespace ktmoe
