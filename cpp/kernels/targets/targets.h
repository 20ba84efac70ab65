// The kernel tables of the instruction sets; a build has those of KTMOE_ISAS.
#pragma once

#include "kernels/contract.h"

#define KT_ISA(enumerator, name, platform, choice) \
  namespace ktmoe::kernels::name {                 \
  const KernelTable& table();                      \
  }
#include "isa/isas.inc"
#undef KT_ISA
