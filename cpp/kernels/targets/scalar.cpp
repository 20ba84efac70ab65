// The kernels without any instruction set beyond the platform's baseline.
#include "kernels/targets/includes.h"

namespace ktmoe::kernels::scalar {

constexpr Isa kIsa = Isa::kScalar;
#include "kernels/targets/region-inl.h"
#include "kernels/policy/vec_scalar.h"
#include "kernels/policy/bytes_portable.h"
#include "kernels/layouts/transpose_portable-inl.h"
#include "kernels/layouts/interleave_portable-inl.h"
#include "kernels/targets/rows_target-inl.h"

}  // namespace ktmoe::kernels::scalar
