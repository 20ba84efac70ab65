// AVX2 with AVX-VNNI, which consumer processors have in place of AVX-512: integer products take a third of
// the instructions, and all else is avx2's. Included by begin_target.h: first for what it defines, then
// inside its namespace.
#ifndef KT_TARGET_NAME

#define KT_TARGET_NAME avx_vnni
#define KT_TARGET_ISA Isa::kAvxVnni
#define KT_TARGET_FEATURES "avx2,fma,f16c,avxvnni"
#define KT_TARGET_BASE avx2
#define KT_HAS_TILES 0
#define KT_HAS_256_BITS 1

#else

#include "kernels/policy/vec_avx2.h"
struct Vec : VecAvx2 {
  // Unsigned by signed: the sign of a weight goes to its factor.
  static KT_INLINE void dot_bytes(IntAcc& acc, Bytes w, Bytes x) {
    acc = _mm256_dpbusd_avx_epi32(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  }
};
#include "kernels/policy/bytes_256.h"
#include "kernels/policy/bytes_avx2.h"
#include "kernels/policy/nibbles_avx2.h"
#include "kernels/policy/ints_256.h"
#include "kernels/policy/dot_avx_vnni.h"
#include "formats/scale_bytes/avx2-inl.h"
#include "kernels/layouts/transpose_portable-inl.h"
#include "kernels/policy/panel_256.h"
#include "kernels/layouts/interleave_avx2-inl.h"
#include "formats/e4m3/avx2-inl.h"

#endif
