// The first include of a source that is compiled once per instruction set: KT_TARGET_HEADER names
// that instruction set's header. Opens its region, where intrinsics compile and inline functions take on its
// instructions, and its namespace; ends with what all bodies use. Include nothing from outside behind this.
#include "kernels/targets/includes.h"
#include KT_TARGET_HEADER

// A table is looked at on any machine, so what fills it stands behind KT_END_TARGET, at the end of a source.
#define KT_PRAGMA(text) _Pragma(#text)
#if !defined(KT_TARGET_FEATURES)
#define KT_BEGIN_TARGET
#define KT_END_TARGET
#elif defined(__clang__)
#define KT_PUSH_TARGET(features) \
  KT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define KT_BEGIN_TARGET KT_PUSH_TARGET(KT_TARGET_FEATURES)
#define KT_END_TARGET KT_PRAGMA(clang attribute pop)
#else
#define KT_PUSH_TARGET(features) KT_PRAGMA(GCC target(features))
#define KT_BEGIN_TARGET KT_PRAGMA(GCC push_options) KT_PUSH_TARGET(KT_TARGET_FEATURES)
#define KT_END_TARGET KT_PRAGMA(GCC pop_options)
#endif

namespace ktmoe::kernels::KT_TARGET_NAME {

// What each source adds to the table. Declared here, as a declaration in the region would have its features.
void add_nt(KernelTable& table);
void add_nt_int8(KernelTable& table);
void add_nt_int8_blocks(KernelTable& table);
void add_nn_tn(KernelTable& table);
void add_elementwise(KernelTable& table);
void add_quantize(KernelTable& table);

}  // namespace ktmoe::kernels::KT_TARGET_NAME

KT_BEGIN_TARGET
namespace ktmoe::kernels::KT_TARGET_NAME {

#include "kernels/targets/region-inl.h"
#define KT_TARGET_REGION
#include KT_TARGET_HEADER
#if KT_HAS_TILES
static_assert(TileVectorPolicy<Vec>);
#else
static_assert(VectorPolicy<Vec>);
#endif
static_assert(!Vec::kLooksUpScaled || LooksUpScaled<Vec>);
#include "kernels/unpack/codes-inl.h"
#include "formats/all.h"
#include "kernels/unpack/blocks-inl.h"
#include "kernels/elementwise/math-inl.h"
#include "kernels/elementwise/elements-inl.h"
