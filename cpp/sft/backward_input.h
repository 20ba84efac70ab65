// Backward to the layer's input, for rows of one expert and columns [n0, n1) of H, in fp32:
//
//   dx = dg Wg + dug Ag + du Wu + duu Au   with dropout dug Ag + duu Au is 0 where the mask of x drops
//
// Where routing weights scale the inputs, an expert gets bf(w x) and dx is the gradient of that. The gradient
// of w is then <dx, x>, by blocks of columns. The rows of a token are added in slot order, weighted where
// inputs are scaled, and rounded once, as in the forward pass.
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

// Packs dg, du, dug and duu of a block of rows as lhs operands in place: nothing reads them as rows later.
void pack_gradients_of_gate_up(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task);

// `sweep_columns` are the columns of the current pass over H, whose results are rows of y.
void backward_input(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task, Span sweep_columns,
                    float* y);

}  // namespace ktmoe
