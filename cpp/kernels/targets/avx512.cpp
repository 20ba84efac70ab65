// The kernels for AVX-512 without a bf16 dot product.
#include <immintrin.h>

#include "kernels/targets/includes.h"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif

namespace ktmoe::kernels::avx512 {

constexpr Isa kIsa = Isa::kAvx512;
#define KT_HAS_AVX512_BF16 0
#include "kernels/targets/region-inl.h"
#include "kernels/policy/vec_avx512.h"
#include "kernels/policy/bytes_avx2.h"
#include "kernels/layouts/transpose_avx512-inl.h"
#include "kernels/layouts/interleave_avx512-inl.h"
#include "kernels/targets/rows_target-inl.h"

}  // namespace ktmoe::kernels::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
