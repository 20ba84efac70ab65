// The weights of a layer as passed by a caller.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/contract.h"
#include "moe/weights/expert_matrices.h"

namespace ktmoe {

struct ExpertBiases {
  std::vector<float> gate, up, down;  // [E, I], [E, I], [E, H], or empty
};

// One matrix per physical expert and projection; `owner` keeps their memory alive.
struct ExpertWeights {
  ExpertMatrices matrices;
  ExpertBiases biases;
  std::vector<uint32_t> logical;  // [E]: the checkpoint's expert that each physical expert is; empty: itself
  std::shared_ptr<const void> owner;

  // Makes expert map[i] of the checkpoint the physical expert i, in matrices, biases and `logical`. Throws
  // std::out_of_range for an expert outside the map; the weights are then as they were.
  void permute(std::span<const int64_t> map);
};

// `count` biases, bf16 or float, as floats.
std::vector<float> read_biases(const void* values, kernels::FloatType type, size_t count);

}  // namespace ktmoe
