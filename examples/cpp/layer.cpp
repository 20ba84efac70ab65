// A layer of random bf16 experts, run from C++: a token has the same bits alone and in a batch.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "core/types.h"
#include "moe/layer/tp_moe.h"
#include "runtime/topology.h"

using ktmoe::bf16;

namespace {

constexpr int64_t kExperts = 8, kPerToken = 2, kHidden = 256, kIntermediate = 128;
constexpr uint32_t kTokens = 16;

std::vector<bf16> random_values(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 0.1f);
  std::vector<bf16> values(count);
  for (bf16& value : values) value = ktmoe::to_bf16(normal(random));
  return values;
}

// One view per expert of matrices [E, rows, columns] that lie one behind the other; nothing is copied.
std::vector<ktmoe::WeightView> views(const std::vector<bf16>& matrices, int64_t rows, int64_t columns) {
  std::vector<ktmoe::WeightView> found;
  for (int64_t e = 0; e < kExperts; ++e) {
    const auto* first = reinterpret_cast<const std::byte*>(matrices.data() + e * rows * columns);
    found.push_back({first, static_cast<ptrdiff_t>(columns * sizeof(bf16)), static_cast<uint32_t>(columns)});
  }
  return found;
}

}  // namespace

int main() {
  const auto gate = random_values(kExperts * kIntermediate * kHidden, 1);
  const auto up = random_values(kExperts * kIntermediate * kHidden, 2);
  const auto down = random_values(kExperts * kHidden * kIntermediate, 3);
  const auto x = random_values(kTokens * kHidden, 4);
  std::vector<int64_t> ids;
  for (uint32_t i = 0; i < kTokens * kPerToken; ++i) ids.push_back(i % kExperts);
  const std::vector<float> weights(ids.size(), 0.5f);

  ktmoe::GeneralMOEConfig config;
  config.expert_num = kExperts;
  config.num_experts_per_tok = kPerToken;
  config.hidden_size = kHidden;
  config.intermediate_size = kIntermediate;
  config.pool =
      std::make_shared<ktmoe::WorkerPool>(ktmoe::WorkerPoolConfig{1, {0}, {2}}, ktmoe::Topology::read());
  ktmoe::TP_MOE layer(config, ktmoe::GemmKernel224BF);
  ktmoe::ExpertWeights experts;
  experts.matrices = {views(gate, kIntermediate, kHidden), views(up, kIntermediate, kHidden),
                      views(down, kHidden, kIntermediate)};
  layer.load_weights(experts);

  const auto forward = [&](uint32_t first, uint32_t count) {
    std::vector<bf16> out(count * kHidden);
    ktmoe::ForwardArgs args;
    args.num_tokens = count;
    args.hidden_states = x.data() + first * kHidden;
    args.topk_ids = ids.data() + first * kPerToken;
    args.topk_weights = weights.data() + first * kPerToken;
    args.out = out.data();
    layer.forward(args);
    return out;
  };
  const std::vector<bf16> batch = forward(0, kTokens), alone = forward(5, 1);
  bool equal = true;
  for (int64_t h = 0; h < kHidden; ++h) equal = equal && batch[5 * kHidden + h].bits == alone[h].bits;
  std::printf("%u tokens; token 5 alone and in the batch: %s\n", kTokens, equal ? "equal" : "NOT equal");
  return equal ? 0 : 1;
}
