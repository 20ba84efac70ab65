// The layer above the kernels: sub-pools and nodes share the outputs, and nobody's bits change.
#include <doctest/doctest.h>

#include <random>
#include <vector>

#include "core/types.h"
#include "moe/tp_moe.h"

namespace ktmoe {
namespace {

using Layer = TP_MOE<AMX_MOE_TP<GemmKernel224BF>>;

constexpr int64_t kExperts = 5, kPerToken = 2, kHidden = 96, kIntermediate = 70;
constexpr uint32_t kTokens = 37;

std::vector<bf16> random_values(size_t count, uint32_t seed) {
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
      matrices.push_back({data + e * rows * row_bytes, static_cast<ptrdiff_t>(row_bytes)});
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

GeneralMOEConfig make_config(std::shared_ptr<WorkerPool> pool) {
  GeneralMOEConfig config;
  config.expert_num = kExperts, config.num_experts_per_tok = kPerToken;
  config.hidden_size = kHidden, config.intermediate_size = kIntermediate;
  config.pool = std::move(pool);
  return config;
}

std::vector<uint16_t> forward(const Model& model, const WorkerPoolConfig& threads, const Topology& topology,
                              bool overwrite_source = false) {
  Model own = model;
  Layer layer(make_config(std::make_shared<WorkerPool>(threads, topology)));
  ExpertWeights weights = own.expert_weights();
  layer.load_weights(weights);
  if (overwrite_source) own.gate.assign(own.gate.size(), bf16{0}), own.down.assign(own.down.size(), bf16{0});

  std::vector<bf16> out(kTokens * kHidden);
  ForwardArgs args;
  args.num_tokens = kTokens;
  args.hidden_states = own.x.data(), args.topk_ids = own.ids.data(), args.topk_weights = own.weights.data();
  args.out = out.data();
  layer.forward(args);
  std::vector<uint16_t> bits;
  for (bf16 v : out) bits.push_back(v.bits);
  return bits;
}

// A machine with two nodes, whose CPUs are the first CPU that is really there.
Topology two_nodes() {
  const int cpu = Topology::read().cpus.front();
  Topology topology;
  topology.cpus = {cpu};
  topology.node_cpus = {{0, {cpu}}, {1, {cpu}}};
  topology.cpu_quota = 1;
  return topology;
}

}  // namespace

TEST_CASE("sub-pools and nodes share a layer without changing a bit") {
  const Model model;
  const auto one = forward(model, {1, {0}, {1}}, Topology::read());
  CHECK(one == forward(model, {1, {0}, {3}}, Topology::read()));
  CHECK(one == forward(model, {2, {0, 0}, {1, 1}}, Topology::read()));
  CHECK(one == forward(model, {3, {0, 0, 0}, {1, 2, 1}}, Topology::read()));
  CHECK(one == forward(model, {2, {0, 1}, {1, 2}}, two_nodes()));
}

TEST_CASE("weights are read in place on one node and copied once on several") {
  const Model model;
  const auto intact = forward(model, {1, {0}, {1}}, Topology::read());
  CHECK(intact != forward(model, {2, {0, 0}, {1, 1}}, Topology::read(), /*overwrite_source=*/true));
  CHECK(intact == forward(model, {2, {0, 1}, {1, 1}}, two_nodes(), /*overwrite_source=*/true));
}

TEST_CASE("on several nodes the source is given back at once, on one when it is replaced") {
  const Model model;
  const auto owner = std::make_shared<int>(7);
  for (const bool several : {false, true}) {
    const WorkerPoolConfig threads =
        several ? WorkerPoolConfig{2, {0, 1}, {1, 1}} : WorkerPoolConfig{1, {0}, {1}};
    Layer layer(make_config(std::make_shared<WorkerPool>(threads, several ? two_nodes() : Topology::read())));
    ExpertWeights weights = model.expert_weights();
    weights.owner = owner;
    layer.load_weights(weights);
    CHECK((weights.owner == owner) == several);
    ExpertWeights others = model.expert_weights();
    layer.load_weights(others);
    CHECK((others.owner == owner) == !several);
  }
}

TEST_CASE("a layer without weights, and weights that do not fit, are refused") {
  const Model model;
  Layer layer(make_config(std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {1}})));
  CHECK_THROWS_WITH_AS(layer.forward({}), "forward: layer 0 has no weights, load them first",
                       std::runtime_error);
  ExpertWeights weights = model.expert_weights();
  weights.matrices.up.pop_back();
  CHECK_THROWS_WITH_AS(layer.load_weights(weights), "up_proj: got 4 values, expected 5",
                       std::invalid_argument);
  CHECK_FALSE(layer.loaded());
}

TEST_CASE("a config names the first field that cannot be used") {
  GeneralMOEConfig config = make_config(std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {1}}));
  config.hidden_size = 0;
  CHECK_THROWS_WITH_AS(config.validate(), "hidden_size: got 0, expected 1 to 16777216",
                       std::invalid_argument);
  config = make_config(nullptr);
  CHECK_THROWS_WITH_AS(config.validate(), "pool: got none, expected the backend_ of a CPUInfer",
                       std::invalid_argument);
  config = make_config(std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {1}}));
  config.activation.kind = kernels::ActivationKind::kRelu2;
  CHECK_THROWS_WITH_AS(config.validate(), "activation: relu2 has no gated form", std::invalid_argument);
}

}  // namespace ktmoe
