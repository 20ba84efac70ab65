// The kernel tables: which are compiled in, and the one that this process uses.
#pragma once

#include <vector>

#include "isa/isa.h"
#include "kernels/contract.h"

namespace ktmoe::kernels {

std::vector<Isa> compiled_isas();

// The table of the instruction set chosen for this process: KTMOE_ISA when set, else the best.
// Throws as select_isa does; the choice is made once.
const KernelTable& active_table();

}  // namespace ktmoe::kernels
