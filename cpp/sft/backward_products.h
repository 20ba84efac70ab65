// The products with weights (NN) that the steps of the backward pass use.
#pragma once

#include "sft/training_pass.h"

namespace ktmoe {

kernels::KeptRows kept_from(const kernels::KeptRows& all, size_t row, size_t column);

// Appends the terms of a projection: G times the rows of its weight, one term per node.
void add_terms(const TrainingPass& pass, const kernels::Operand& g,
               std::vector<WeightView> ExpertMatrices::* matrices, Span OutputShare::* share, size_t e,
               std::vector<kernels::NnTerm>& terms);

// The term of an adapter's A [R, K].
kernels::NnTerm adapter_term(const TrainingPass& pass, const kernels::Operand& g, LoraId a,
                             const BlockTask& task);

// C[m, k - k0] = sum of the terms for columns [k0, k1); `nn` has further arguments, such as prefetches.
void multiply_terms(const TrainingPass& pass, std::span<const kernels::NnTerm> terms, Span columns, float* c,
                    size_t c_stride, std::byte* scratch, kernels::NnArgs nn = {});

// to[m, :] = bf(scale * G B) for an adapter's B [N, R], with row stride `stride`.
void rounded_product(const TrainingPass& pass, BackwardScratch& scratch, const kernels::Operand& g,
                     const WeightView& b, float scale, bf16* to, size_t stride);

// Applies the dropout mask to rows of an adapter's gradient, in place.
void drop_columns(const kernels::KernelTable& kernels, const MaskView& mask, const int32_t* tokens,
                  uint32_t rows, Span columns, float* l);

}  // namespace ktmoe
