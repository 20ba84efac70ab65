// The kernels without any instruction set beyond the platform's baseline.
#include "kernels/targets/includes.h"

namespace ktmoe::kernels::scalar {

constexpr Isa kIsa = Isa::kScalar;
#include "kernels/body/region.h"
#include "kernels/policy/vec_scalar.h"
#include "kernels/policy/bytes_portable.h"
#include "kernels/body/transpose_portable.h"
#include "kernels/body/interleave_portable.h"
#include "kernels/body/rows_target.h"

}  // namespace ktmoe::kernels::scalar
