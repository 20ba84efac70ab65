// The end of a layer whose experts were computed elsewhere: a token's rows are summed as the layer does.
#pragma once

#include <cstdint>

#include "kernels/contract.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// All arrays are contiguous and owned by the caller.
struct RowSums {
  uint32_t num_tokens = 0, slots = 0, hidden_size = 0;
  const float* rows = nullptr;          // [S, H]: unweighted rows of experts, or partial sums
  const int32_t* row = nullptr;         // [T, P]: which of them belongs to a slot; negative for none
  const float* weights = nullptr;       // [T, P], or null for ones
  const bf16* hidden_states = nullptr;  // [T, H]: tokens that are not finite get NaN
  void* out = nullptr;                  // [T, H]
  kernels::FloatType out_type = kernels::FloatType::kBf16;
};

// out[t] = sum over p in slot order of weights[t, p] * rows[row[t, p]], rounded once: the bits that a layer
// gives which computes these rows itself.
void combine_rows(const RowSums& sums, WorkerPool& pool);

}  // namespace ktmoe
