// The inputs of the experts of a layer whose routing weights scale the inputs rather than the outputs:
//
//   x'[t, p] = bf(w[t, p] x[t])                 one row of the plan each
//   grad_w[t, p] = <grad_x'[t, p], x[t]>        in blocks of columns, so that the order of summation does not
//                                               depend on how columns are cut
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/contract.h"
#include "moe/plan/routing_plan.h"

namespace ktmoe {

// Scales the input of every slot of tokens [begin, end) that has a row of the plan. `x` and `to` have rows of
// `size` elements, `weights` is [T, slots]. A row that is not finite is all NaN.
void scale_inputs(const kernels::KernelTable& kernels, const RoutingPlan& plan, const bf16* x,
                  const float* weights, size_t slots, size_t size, uint32_t begin, uint32_t end, bf16* to);

}  // namespace ktmoe
