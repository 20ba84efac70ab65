// The inputs of the experts of a layer that scales them by the routing weights, rather than the outputs:
//
//   x'[t, p] = bf(w[t, p] x[t])                 a row of the plan each
//   grad_w[t, p] = <grad_x'[t, p], x[t]>        in blocks of columns, so that no order depends on the cutting
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"
#include "moe/plan/routing_plan.h"

namespace ktmoe {

// to = bf(w x), `size` elements. A row that does not come out finite is all NaN.
void scale_row(const bf16* x, float w, size_t size, bf16* to);

// scale_row for every slot of tokens [begin, end) that has a row of the plan. `weights` is [T, slots].
void scale_inputs(const RoutingPlan& plan, const bf16* x, const float* weights, size_t slots, size_t size,
                  uint32_t begin, uint32_t end, bf16* to);

// blocks[b] = sum of grad x over the columns of block b, kOutputBlock wide.
void dot_by_blocks(const float* grad, const bf16* x, size_t size, float* blocks);

}  // namespace ktmoe
