// Gradients of matrices: sums over the rows of an expert in order. A task computes one block of a gradient.
//
//   dBd += s q^T bf(w ud)    dAd += bf(s w r)^T h    dBg += s dg^T ug    dAg += dug^T x    up likewise
//   dWd = q^T bf(w h)        dWg = dg^T x            dWu = du^T x
//
// Each is a TN product D[n, k] = sum_m G[m, n] X[m, k] with the narrower matrix as G. Where D is the
// transpose of the gradient, strides store it transposed. A gradient belongs to an expert of the checkpoint;
// physical experts that share its weights add to it one after the other.
#pragma once

#include "sft/training_pass.h"

namespace ktmoe {

// One gradient: the rows that it is computed from, and its layout.
struct WeightGradient {
  float* d = nullptr;  // [E, ...]
  // G and X by plan rows, or by tokens (of_tokens).
  struct Rows {
    const bf16* data = nullptr;
    uint32_t width = 0;
    size_t stride = 0;
    bool of_tokens = false;
    bool weighted = false;  // times the routing weight, rounded
    MaskView mask = {};     // dropped elements are zero
  } g, x;
  float scale = 1;
  bool transposed = false;  // D is stored as [width of X, width of G]
};

// Rows n and columns k of D, for one expert.
struct WeightGradientTask {
  uint32_t gradient;
  uint32_t expert;  // of the checkpoint
  Span n, k;
};

// The requested gradients.
std::vector<WeightGradient> weight_gradients(const TrainingPass& pass);

std::vector<WeightGradientTask> cut_weight_gradients(const std::vector<WeightGradient>& gradients,
                                                     uint32_t num_experts);

void backward_weights(const TrainingPass& pass, const std::vector<WeightGradient>& gradients,
                      BackwardScratch& scratch, const WeightGradientTask& task);

}  // namespace ktmoe
