// A small layer of experts, its weights and a batch, for the tests of what is above the kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "core/types.h"
#include "moe/layer/interface.h"
#include "runtime/topology.h"

namespace ktmoe::test {

inline constexpr int64_t kExperts = 5, kPerToken = 2, kHidden = 96, kIntermediate = 70;
inline constexpr uint32_t kTokens = 37;

inline std::vector<bf16> random_values(size_t count, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<bf16> values(count);
  for (bf16& v : values) v = to_bf16(normal(rng));
  return values;
}

struct Model {
  std::vector<bf16> gate = random_values(kExperts * kIntermediate * kHidden, 1);
  std::vector<bf16> up = random_values(kExperts * kIntermediate * kHidden, 2);
  std::vector<bf16> down = random_values(kExperts * kHidden * kIntermediate, 3);
  std::vector<bf16> x = random_values(kTokens * kHidden, 4);
  std::vector<int64_t> ids;
  std::vector<float> weights = std::vector<float>(kTokens * kPerToken, 0.5f);

  Model() {
    for (uint32_t i = 0; i < kTokens * kPerToken; ++i) ids.push_back(static_cast<int64_t>(i * 7 % 6) - 1);
  }

  static std::vector<WeightView> views(const std::vector<bf16>& values, size_t rows, size_t columns) {
    std::vector<WeightView> matrices;
    const auto* data = reinterpret_cast<const std::byte*>(values.data());
    const size_t row_bytes = columns * sizeof(bf16);
    for (size_t e = 0; e < kExperts; ++e)
      matrices.push_back(
          {data + e * rows * row_bytes, static_cast<ptrdiff_t>(row_bytes), static_cast<uint32_t>(columns)});
    return matrices;
  }

  ExpertWeights expert_weights() const {
    ExpertWeights w;
    w.matrices = {views(gate, kIntermediate, kHidden), views(up, kIntermediate, kHidden),
                  views(down, kHidden, kIntermediate)};
    w.biases.down.assign(kExperts * kHidden, 0.25f);
    return w;
  }
};

template <class Config = GeneralMOEConfig>
Config make_config(std::shared_ptr<WorkerPool> pool) {
  Config config;
  config.expert_num = kExperts, config.num_experts_per_tok = kPerToken;
  config.hidden_size = kHidden, config.intermediate_size = kIntermediate;
  config.pool = std::move(pool);
  return config;
}

// A machine with two nodes, whose CPUs are the first CPU that is really there.
inline Topology two_nodes() {
  const int cpu = Topology::read().cpus.front();
  Topology topology;
  topology.cpus = {cpu};
  topology.node_cpus = {{0, {cpu}}, {1, {cpu}}};
  topology.cpu_quota = 1;
  return topology;
}

}  // namespace ktmoe::test
