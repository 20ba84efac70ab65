// The layer above the kernels: sub-pools and nodes share the outputs, and no bit changes.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "layer_model.h"
#include "moe/layer/tp_moe.h"

namespace ktmoe {
namespace {

using namespace ktmoe::test;

struct Layer : TP_MOE {
  explicit Layer(const GeneralMOEConfig& config) : TP_MOE(config, GemmKernel224BF) {}
};

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

TEST_CASE("scales that several rows share go to every node that has one of the rows") {
  constexpr int64_t kWidth = 288,
                    kColumns = 160;  // of gate and up: rows of three blocks, the last one ragged
  std::mt19937 random(1);
  const auto bytes = [&](size_t count) {
    std::vector<std::byte> drawn(count);
    for (std::byte& b : drawn)
      b = static_cast<std::byte>(random() % 120);  // E4M3 that is positive and a number
    return drawn;
  };
  const auto scales = [&](size_t count) {
    std::vector<float> drawn(count);
    for (float& s : drawn) s = std::ldexp(1.0f, -14 - static_cast<int>(random() % 4));
    return drawn;
  };
  const auto first = bytes(kWidth * kColumns), last = bytes(kColumns * kWidth);
  const auto first_scales = scales(3 * 2), last_scales = scales(2 * 3);
  const std::vector<bf16> x = random_values(kColumns, 4);
  const int64_t id = 0;
  const auto forward_on = [&](const WorkerPoolConfig& threads, const Topology& topology) {
    GeneralMOEConfig config;
    config.expert_num = config.num_experts_per_tok = 1;
    config.hidden_size = kColumns, config.intermediate_size = kWidth;
    config.pool = std::make_shared<WorkerPool>(threads, topology);
    TP_MOE layer(config, gemm_kernel(find_method("FP8"), config));
    const auto view = [](const std::vector<std::byte>& codes, const std::vector<float>& s, int64_t columns) {
      WeightView w{codes.data(), static_cast<ptrdiff_t>(columns), static_cast<uint32_t>(columns)};
      w.format = FormatId::kFp8;
      w.block_scales = reinterpret_cast<const std::byte*>(s.data());
      w.block_scales_stride_bytes = static_cast<ptrdiff_t>((columns + 127) / 128 * 4);
      return w;
    };
    ExpertWeights weights;
    weights.matrices.gate = weights.matrices.up = {view(first, first_scales, kColumns)};
    weights.matrices.down = {view(last, last_scales, kWidth)};
    layer.load_weights(weights);
    std::vector<float> out(kColumns);
    ForwardArgs args;
    args.hidden_states = x.data(), args.topk_ids = &id, args.num_tokens = 1;
    args.out = out.data(), args.out_type = kernels::FloatType::kFloat32;
    layer.forward(args);
    return out;
  };
  const auto one = forward_on({1, {0}, {1}}, Topology::read());
  CHECK(std::all_of(one.begin(), one.end(), [](float v) { return std::isfinite(v) && v != 0; }));
  CHECK(one == forward_on({2, {0, 0}, {1, 1}}, Topology::read()));
  CHECK(one == forward_on({2, {0, 1}, {1, 1}}, two_nodes()));
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
  CHECK_THROWS_WITH_AS(config.validate(), "activation: got relu2 with a gate, expected gated=False",
                       std::invalid_argument);
}

}  // namespace ktmoe
