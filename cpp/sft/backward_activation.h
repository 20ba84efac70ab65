// Backward through the down projection and the activation, for rows of one expert and columns [n0, n1) of I:
//
//   z = q Wd + s r Ad             fp32; with dropout r Ad is 0 where the mask of h drops
//   <z, h>                        for the gradient of the routing weight, block by block
//   dg, du = bf(w z act'(g, u))   in place of g and u where the types match
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

void backward_activation(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task);

}  // namespace ktmoe
