// The kernels for AMX: products on the tile unit, the rest on AVX-512.
#include <immintrin.h>

#include "kernels/targets/includes.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                                          \
    __attribute__((target(                                                                                                             \
        "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,amx-tile,amx-bf16,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,amx-tile,amx-bf16,amx-int8")
#endif

namespace ktmoe::kernels::amx {

constexpr Isa kIsa = Isa::kAmx;
#define KT_HAS_AVX512_BF16 1
#include "kernels/targets/region-inl.h"
#include "kernels/policy/tile_amx.h"
#include "kernels/policy/vec_avx512.h"
#include "kernels/policy/bytes_avx2.h"
#include "kernels/policy/tile_sums_amx.h"
#include "kernels/layouts/transpose_avx512-inl.h"
#include "kernels/layouts/interleave_avx512-inl.h"
#include "kernels/targets/tiles_target-inl.h"

}  // namespace ktmoe::kernels::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
