// The part of the backward pass through the down adapter that needs no base weights, for rows of one expert:
//
//   r = bf(q Bd)            [M, R]
//   bf(s w r), bf(w ud)     [M, R], for the gradients of Ad and Bd
//   <q, down_bias>          [M], for the gradient of w
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

void backward_output(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task);

}  // namespace ktmoe
