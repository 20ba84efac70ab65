// Backward to the layer's input, for rows of one expert and columns [n0, n1) of H, in fp32:
//
//   dx = dg Wg + dug Ag + du Wu + duu Au   with dropout dug Ag + duu Au is 0 where the mask of x drops
//
// These are gradients of what enters the expert. Where the routing weights scale that, so that the input x of
// a token enters as bf(w x), they give the gradient of w too, block by block: <dx, x>.
// The rows of a token are added in slot order and rounded once afterwards, as in the forward pass, weighted
// where inputs are scaled.
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

// dg, du, dug and duu of a block of rows become lhs operands where they lie: nothing reads them as rows any
// more.
void pack_gradients_of_gate_up(TrainingPass& pass, BackwardScratch& scratch, const PanelTask& task);

// `pass_columns` are those of the pass over H, whose results are rows of y.
void backward_input(TrainingPass& pass, BackwardScratch& scratch, const PanelTask& task, Span pass_columns,
                    float* y);

}  // namespace ktmoe
