// Gradients of matrices, sums over the rows of an expert in their order, for one block of a gradient a task:
//
//   dBd += s q^T bf(w ud)    dAd += bf(s w r)^T h    dBg += s dg^T ug    dAg += dug^T x    up likewise
//   dWd = q^T bf(w h)        dWg = dg^T x            dWu = du^T x
//
// Each is a TN product D[n, k] = sum_m G[m, n] X[m, k] with the narrower matrix as G; where that gives the
// transpose of the gradient it is stored by strides. A gradient belongs to an expert of the checkpoint;
// experts that share its weights add to it one after the other.
#pragma once

#include "sft/training_pass.h"

namespace ktmoe {

// One gradient: whose rows make it, and how it lies in memory.
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
  bool transposed = false;  // D lies as [width of X, width of G]
};

// Columns of X, and rows of D, that a task takes.
struct WeightGradientTask {
  uint32_t gradient;
  uint32_t expert;  // of the checkpoint
  Span n, k;
};

// The gradients that are asked for.
std::vector<WeightGradient> weight_gradients(const TrainingPass& pass);

std::vector<WeightGradientTask> cut_weight_gradients(const std::vector<WeightGradient>& gradients,
                                                     uint32_t num_experts);

void backward_weights(const TrainingPass& pass, const std::vector<WeightGradient>& gradients,
                      BackwardScratch& scratch, const WeightGradientTask& task);

}  // namespace ktmoe
