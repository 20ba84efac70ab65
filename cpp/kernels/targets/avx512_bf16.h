// AVX-512 with the bf16 dot product and VBMI.
// Included by begin_target.h: first for what it defines, then inside its namespace.
#ifndef KT_TARGET_NAME

#define KT_TARGET_NAME avx512_bf16
#define KT_TARGET_ISA Isa::kAvx512Bf16
#define KT_TARGET_FEATURES \
  "avx2,fma,f16c,"         \
  "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2"
#define KT_HAS_AVX512_BF16 1
#define KT_HAS_TILES 0

#else

#include "kernels/policy/vec_avx512.h"
#include "kernels/policy/bytes_avx2.h"
#include "kernels/layouts/transpose_avx512-inl.h"
#include "kernels/layouts/interleave_avx512-inl.h"

#endif
