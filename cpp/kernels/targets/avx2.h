// AVX2 with FMA and F16C.
// Included by begin_target.h: first for what it defines, then inside its namespace.
#ifndef KT_TARGET_NAME

#define KT_TARGET_NAME avx2
#define KT_TARGET_ISA Isa::kAvx2
#define KT_TARGET_FEATURES "avx2,fma,f16c"
#define KT_HAS_TILES 0
#define KT_HAS_256_BITS 1

#else

#include "kernels/policy/vec_avx2.h"
using Vec = VecAvx2;
#include "kernels/policy/bytes_256.h"
#include "kernels/policy/bytes_avx2.h"
#include "kernels/policy/nibbles_avx2.h"
#include "kernels/policy/ints_256.h"
#include "kernels/policy/dot_avx2.h"
#include "formats/scale_bytes/avx2-inl.h"
#include "kernels/layouts/transpose_portable-inl.h"
#include "kernels/policy/panel_256.h"
#include "kernels/layouts/interleave_avx2-inl.h"
#include "formats/e4m3/avx2-inl.h"

#endif
