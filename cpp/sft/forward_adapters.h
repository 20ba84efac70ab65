// The adapters in the forward pass. For a projection with weights W, A [R, K], B [N, R]:
//
//   lora_hidden = bf(x A^T)   [M, R], kept for the backward pass
//   x W^T + s lora_hidden B^T [M, N], added in fp32 when the C blocks of both are read
//
// With dropout A takes x (or h) with zeros where the mask drops.
#pragma once

#include "sft/training_pass.h"

namespace ktmoe {

// ug and uu of a block of rows.
void gate_up_lora_hidden(TrainingPass& pass, WorkerScratch& scratch, const PanelTask& task);

// ud of a block of rows.
void down_lora_hidden(TrainingPass& pass, WorkerScratch& scratch, const PanelTask& task);

// What the adapter adds to outputs [task.n0, task.n1): lora_hidden B^T, in one of the worker's C blocks.
// `block` is 0 for gate and down, 1 for up; `projection` the index of its lora_hidden rows.
const float* adapter_output(TrainingPass& pass, WorkerScratch& scratch, const PanelTask& task, size_t block,
                            size_t projection, LoraId b);

}  // namespace ktmoe
