#include "moe/layer/scaled_inputs.h"

#include <algorithm>

#include "kernels/contract.h"

namespace ktmoe {

void scale_row(const bf16* x, float w, size_t size, bf16* to) {
  constexpr uint16_t kExponent = 0x7f80;
  constexpr bf16 kNaN{0x7fc0};
  uint32_t bad = 0;
  for (size_t i = 0; i < size; ++i) {
    to[i] = to_bf16(w * to_float(x[i]));
    bad |= (to[i].bits & kExponent) == kExponent;
  }
  if (bad) std::fill_n(to, size, kNaN);
}

void scale_inputs(const RoutingPlan& plan, const bf16* x, const float* weights, size_t slots, size_t size,
                  uint32_t begin, uint32_t end, bf16* to) {
  for (size_t i = begin * slots; i < end * slots; ++i) {
    const int32_t row = plan.row[i];
    if (row >= 0) scale_row(x + i / slots * size, weights[i], size, to + static_cast<size_t>(row) * size);
  }
}

void dot_by_blocks(const float* grad, const bf16* x, size_t size, float* blocks) {
  // Sums side by side, which any vector unit can hold.
  constexpr size_t kLanes = 8;
  for (size_t begin = 0; begin < size; begin += kernels::kOutputBlock) {
    const size_t end = std::min<size_t>(begin + kernels::kOutputBlock, size);
    float lanes[kLanes] = {};
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (size_t j = 0; j < kLanes; ++j) lanes[j] += grad[i + j] * to_float(x[i + j]);
    for (size_t j = 0; i + j < end; ++j) lanes[j] += grad[i + j] * to_float(x[i + j]);
    for (size_t half = kLanes / 2; half > 0; half /= 2)
      for (size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    *blocks++ = lanes[0];
  }
}

}  // namespace ktmoe
