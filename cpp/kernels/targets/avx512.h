// AVX-512 with VNNI, without a bf16 dot product.
// Included by begin_target.h: first for what it defines, then inside its namespace.
#ifndef KT_TARGET_NAME

#define KT_TARGET_NAME avx512
#define KT_TARGET_ISA Isa::kAvx512
#define KT_TARGET_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define KT_HAS_AVX512_BF16 0
#define KT_HAS_TILES 0

#else

#include "kernels/policy/vec_avx512.h"
#include "kernels/policy/bytes_avx2.h"
#include "kernels/layouts/transpose_avx512-inl.h"
#include "kernels/layouts/interleave_avx512-inl.h"

#endif
