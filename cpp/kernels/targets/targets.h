// The kernel tables of the targets; a build has those of KTMOE_ISAS.
#pragma once

#include "kernels/contract.h"

namespace ktmoe::kernels {

namespace scalar {
const KernelTable& table();
}
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
namespace avx512_bf16 {
const KernelTable& table();
}
namespace amx {
const KernelTable& table();
}
namespace amx_emu {
const KernelTable& table();
}

}  // namespace ktmoe::kernels
