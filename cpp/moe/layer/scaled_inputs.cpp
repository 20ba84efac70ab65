#include "moe/layer/scaled_inputs.h"

namespace ktmoe {

void scale_inputs(const kernels::KernelTable& kernels, const RoutingPlan& plan, const bf16* x,
                  const float* weights, size_t slots, size_t size, uint32_t begin, uint32_t end, bf16* to) {
  for (size_t i = begin * slots; i < end * slots; ++i) {
    const int32_t row = plan.row[i];
    if (row >= 0)
      kernels.elementwise.scale_finite(x + i / slots * size, weights[i], size,
                                       to + static_cast<size_t>(row) * size);
  }
}

}  // namespace ktmoe
