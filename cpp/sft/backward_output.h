// Backward through the adapter of the down projection, as far as it needs no weights. For rows of one expert,
// with q = dY of their tokens, w their routing weights:
//
//   r = bf(q Bd)            [M, R]
//   bf(s w r), bf(w ud)     [M, R], for the gradients of Ad and Bd
//   <q, down_bias>          [M], for the gradient of w
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

void backward_output(TrainingPass& pass, BackwardScratch& scratch, const PanelTask& task);

}  // namespace ktmoe
