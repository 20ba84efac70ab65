// No instruction set beyond the platform's baseline.
// Included by begin_target.h: first for what it defines, then inside its namespace.
#ifndef KT_TARGET_NAME

#define KT_TARGET_NAME scalar
#define KT_TARGET_ISA Isa::kScalar
#define KT_HAS_TILES 0
#define KT_HAS_256_BITS 0

#else

#include "kernels/policy/vec_scalar.h"
#include "kernels/policy/bytes_portable.h"
#include "kernels/policy/nibbles_portable.h"
#include "kernels/policy/ints_portable.h"
#include "formats/scale_bytes/portable-inl.h"
#include "kernels/layouts/transpose_portable-inl.h"
#include "kernels/layouts/interleave_portable-inl.h"
#include "formats/e4m3/scalar-inl.h"

#endif
