// Backward through B of the adapters of gate and up, for rows of one expert:
//
//   dug = bf(s dg Bg), duu = bf(s du Bu)   [M, R]
#pragma once

#include "sft/backward_products.h"

namespace ktmoe {

void backward_lora_hidden(TrainingPass& pass, BackwardScratch& scratch, const BlockTask& task);

}  // namespace ktmoe
