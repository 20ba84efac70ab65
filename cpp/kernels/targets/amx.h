// AMX: products on the tile unit, the rest on AVX-512.
// Included by begin_target.h: first for what it defines, then inside its namespace.
#ifndef KT_TARGET_NAME

#define KT_TARGET_NAME amx
#define KT_TARGET_ISA Isa::kAmx
#define KT_TARGET_FEATURES                         \
  "avx2,fma,f16c,"                                 \
  "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni," \
  "avx512bf16,avx512vbmi,avx512vbmi2,amx-tile,amx-bf16,amx-int8"
#define KT_HAS_TILES 1
#define KT_HAS_256_BITS 1

#else

#include "kernels/policy/tile_amx.h"
#include "kernels/policy/vec_avx512_base.h"
#include "kernels/policy/vec_avx512_bf16.h"
using Vec = VecAvx512Bf16;
#include "kernels/policy/bytes_256.h"
#include "kernels/policy/bytes_avx512.h"
#include "kernels/policy/nibbles_avx512_bf16.h"
#include "kernels/policy/ints_256.h"
#include "kernels/policy/dot_avx512.h"
#include "kernels/policy/digits_avx512.h"
#include "formats/scale_bytes/avx2-inl.h"
#include "kernels/policy/tile_sums_amx.h"
#include "kernels/layouts/transpose_avx512-inl.h"
#include "kernels/policy/panel_512.h"
#include "kernels/layouts/interleave_avx512-inl.h"
#include "formats/e4m3/avx512-inl.h"
#include "formats/e4m3/avx512_bf16-inl.h"
using E4m3 = E4m3Avx512Bf16;
#include "formats/nvfp4/avx512_bf16-inl.h"

#endif
