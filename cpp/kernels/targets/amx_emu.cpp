// The tile kernels of AMX on an emulator, so that they are tested on any machine.
#include "kernels/targets/includes.h"

namespace ktmoe::kernels::amx_emu {

constexpr Isa kIsa = Isa::kAmxEmu;
#include "kernels/targets/region-inl.h"
#include "kernels/policy/tile_emu.h"
#include "kernels/policy/vec_scalar.h"
#include "kernels/policy/bytes_portable.h"
#include "kernels/policy/tile_sums_emu.h"
#include "kernels/layouts/transpose_portable-inl.h"
#include "kernels/layouts/interleave_portable-inl.h"
#include "kernels/targets/tiles_target-inl.h"

}  // namespace ktmoe::kernels::amx_emu
