// The tile kernels of AMX on an emulator, so that they are tested on any machine.
// Included by begin_target.h: first for what it defines, then inside its namespace.
#ifndef KT_TARGET_NAME

#include <stdexcept>
#include <string>

#define KT_TARGET_NAME amx_emu
#define KT_TARGET_ISA Isa::kAmxEmu
#define KT_HAS_TILES 1
#define KT_HAS_256_BITS 0

#else

#include "kernels/policy/tile_emu.h"
#include "kernels/policy/vec_scalar.h"
#include "kernels/policy/bytes_portable.h"
#include "kernels/policy/nibbles_portable.h"
#include "kernels/policy/ints_portable.h"
#include "kernels/policy/digits_portable.h"
#include "formats/scale_bytes/portable-inl.h"
#include "kernels/policy/tile_sums_emu.h"
#include "kernels/layouts/transpose_portable-inl.h"
#include "kernels/layouts/interleave_portable-inl.h"
#include "formats/e4m3/scalar-inl.h"

#endif
