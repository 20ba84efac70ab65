// The kernels for AVX2 with FMA.
#include <immintrin.h>

#include "kernels/targets/includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ktmoe::kernels::avx2 {

constexpr Isa kIsa = Isa::kAvx2;

#include "kernels/targets/region-inl.h"
#include "kernels/policy/vec_avx2.h"
#include "kernels/policy/bytes_avx2.h"
#include "kernels/layouts/transpose_portable-inl.h"
#include "kernels/layouts/interleave_avx2-inl.h"
#include "kernels/targets/rows_target-inl.h"

}  // namespace ktmoe::kernels::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
