// The adapters in the forward pass. For a projection with weights W, A [R, K], B [N, R]:
//
//   ux = bf(x A^T)       [M, R], the LoRA hidden state (ug, uu or ud), kept for the backward pass
//   x W^T + s ux B^T     [M, N], added in fp32 when the C blocks of both are read
//
// With dropout the input of A is masked, that of W is not.
#pragma once

#include "sft/training_pass.h"

namespace ktmoe {

// ug and uu of a block of rows.
void gate_up_lora_hidden(TrainingPass& pass, WorkerScratch& scratch, const BlockTask& task);

// ud of a block of rows.
void down_lora_hidden(TrainingPass& pass, WorkerScratch& scratch, const BlockTask& task);

// The adapter's part of outputs [task.n0, task.n1), ux B^T, in one of the worker's C blocks: `block` is 0 for
// gate and down, 1 for up. `projection` is the index in CachedRows::lora_hidden.
const float* adapter_output(TrainingPass& pass, WorkerScratch& scratch, const BlockTask& task, size_t block,
                            size_t projection, LoraId b);

}  // namespace ktmoe
