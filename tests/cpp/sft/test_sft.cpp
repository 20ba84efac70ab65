// The layer for training: sharing the work changes no bit; caches and refusals.
#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include "layer_model.h"
#include "moe/layer/tp_moe.h"
#include "sft/tp_moe_sft.h"

namespace ktmoe {
namespace {

using namespace ktmoe::test;
struct Layer : TP_MOE_SFT {
  explicit Layer(const MOESFTConfig& config) : TP_MOE_SFT(config, GemmKernel224BF) {}
};

constexpr int64_t kRank = 3;

MOESFTConfig training_config(std::shared_ptr<WorkerPool> pool) {
  auto config = make_config<MOESFTConfig>(std::move(pool));
  config.lora_rank = kRank, config.lora_alpha = 5.0;
  return config;
}

// Everything that one step gives: the output, and every gradient, as bits.
using Bits = std::vector<std::vector<uint32_t>>;

template <class T>
std::vector<uint32_t> bits_of(const std::vector<T>& values) {
  std::vector<uint32_t> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) std::memcpy(&bits[i], &values[i], sizeof(T));
  return bits;
}

// The arrays of a step of one layer.
struct Step {
  const Model model;
  std::vector<std::vector<bf16>> lora;
  std::vector<bf16> out = std::vector<bf16>(kTokens * kHidden),
                    grad_output = random_values(kTokens * kHidden, 9);
  std::vector<bf16> grad_input = out;
  std::vector<float> grad_weights = std::vector<float>(kTokens * kPerToken);
  std::vector<std::vector<float>> grad_lora;
  std::vector<float> grad_gate, grad_up, grad_down;

  explicit Step(const MOESFTConfig& config) {
    for (size_t i = 0; i < kNumLora; ++i) {
      const size_t size = kExperts * lora_shape(config, static_cast<LoraId>(i)).size();
      lora.push_back(random_values(size, static_cast<uint32_t>(20 + i)));
      grad_lora.emplace_back(size);
    }
    for (auto* grad : {&grad_gate, &grad_up, &grad_down}) grad->resize(kExperts * kHidden * kIntermediate);
  }

  LoraSources sources() const {
    LoraSources sources;
    for (size_t i = 0; i < kNumLora; ++i) sources[i] = {lora[i].data(), kernels::FloatType::kBf16};
    return sources;
  }
  ForwardArgs forward_args() {
    ForwardArgs args;
    args.num_tokens = kTokens, args.hidden_states = model.x.data();
    args.topk_ids = model.ids.data(), args.topk_weights = model.weights.data();
    args.out = out.data();
    return args;
  }
  BackwardArgs backward_args() {
    BackwardArgs args;
    args.num_tokens = kTokens, args.grad_output = grad_output.data();
    args.grad_input = grad_input.data(), args.grad_weights = grad_weights.data();
    for (size_t i = 0; i < kNumLora; ++i) args.lora[i] = grad_lora[i].data();
    args.gate_proj = grad_gate.data(), args.up_proj = grad_up.data(), args.down_proj = grad_down.data();
    return args;
  }
  Bits bits() const {
    Bits all = {bits_of(out),       bits_of(grad_input), bits_of(grad_weights),
                bits_of(grad_gate), bits_of(grad_up),    bits_of(grad_down)};
    for (const auto& grad : grad_lora) all.push_back(bits_of(grad));
    return all;
  }
};

void load(Layer& layer, const Step& step) {
  ExpertWeights weights = step.model.expert_weights();
  layer.load_weights(weights);
  layer.update_lora_weights(step.sources());
}

std::shared_ptr<WorkerPool> one_thread() {
  return std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {1}}, Topology::read());
}

Bits train(const WorkerPoolConfig& threads, const Topology& topology, bool recompute = false,
           double dropout = 0) {
  MOESFTConfig config = training_config(std::make_shared<WorkerPool>(threads, topology));
  config.recompute = recompute, config.lora_dropout = dropout;
  Layer layer(config);
  Step step(config);
  load(layer, step);
  layer.forward_sft(step.forward_args(), true);
  layer.backward(step.backward_args());
  return step.bits();
}

}  // namespace

TEST_CASE("sub-pools, nodes and threads share a training step without changing a bit") {
  for (const double dropout : {0.0, 0.25}) {
    const auto one = train({1, {0}, {1}}, Topology::read(), false, dropout);
    CHECK(one == train({1, {0}, {3}}, Topology::read(), false, dropout));
    CHECK(one == train({2, {0, 0}, {1, 2}}, Topology::read(), false, dropout));
    CHECK(one == train({2, {0, 1}, {1, 2}}, two_nodes(), false, dropout));
    CHECK(one == train({1, {0}, {2}}, Topology::read(), true, dropout));
  }
}

TEST_CASE("adapters of zeros leave the bits of inference") {
  MOESFTConfig config = training_config(one_thread());
  Layer layer(config);
  Step step(config);
  ExpertWeights weights = step.model.expert_weights();
  layer.load_weights(weights);
  layer.forward(step.forward_args());
  const auto inference = bits_of(step.out);
  layer.forward_sft(step.forward_args(), false);
  CHECK(bits_of(step.out) == inference);
  CHECK(layer.num_cached() == 0);
  const size_t kept = layer.cache_bytes();  // the memory of a pass that is not saved serves the next
  layer.forward_sft(step.forward_args(), false);
  CHECK(kept > 0);
  CHECK(layer.cache_bytes() == kept);
  layer.update_lora_weights(step.sources());
  layer.forward_sft(step.forward_args(), false);
  CHECK(bits_of(step.out) != inference);
}

TEST_CASE("forward passes wait in a stack, and with the adapters that they were computed with") {
  MOESFTConfig config = training_config(one_thread());
  config.max_cache_depth = 2;
  Layer layer(config);
  Step first(config), second(config);
  load(layer, first);
  layer.forward_sft(first.forward_args(), true);
  layer.backward(first.backward_args());
  const Bits alone = first.bits();

  layer.forward_sft(first.forward_args(), true);
  for (auto& values : second.lora) values.assign(values.size(), to_bf16(0.5f));
  layer.update_lora_weights(second.sources());
  layer.forward_sft(second.forward_args(), true);
  CHECK(layer.num_cached() == 2);
  CHECK_THROWS_WITH_AS(
      layer.forward_sft(first.forward_args(), true),
      "forward_sft: got 2 saved forward passes of layer 0, expected fewer than max_cache_depth 2; "
      "call backward or clear the cache first",
      std::runtime_error);
  layer.backward(second.backward_args());
  layer.backward(first.backward_args());
  CHECK(first.bits() == alone);
  CHECK(second.bits() != alone);
  CHECK(layer.num_cached() == 0);
}

TEST_CASE("a step counts the forwards that are saved, and keys their masks") {
  MOESFTConfig config = training_config(one_thread());
  config.lora_dropout = 0.5;
  Layer layer(config);
  Step step(config);
  load(layer, step);
  layer.forward_sft(step.forward_args(), false);
  CHECK(layer.step() == 0);
  layer.forward_sft(step.forward_args(), true);
  const auto first = bits_of(step.out);
  layer.clear_cache();
  layer.forward_sft(step.forward_args(), true);
  CHECK(bits_of(step.out) != first);
  CHECK(layer.step() == 2);
  layer.clear_cache();
  layer.set_step(0);
  layer.forward_sft(step.forward_args(), true);
  CHECK(bits_of(step.out) == first);
}

TEST_CASE("what cannot be trained is refused and changes nothing") {
  MOESFTConfig config = training_config(one_thread());
  Layer layer(config);
  Step step(config);
  CHECK_THROWS_WITH_AS(layer.forward_sft(step.forward_args(), true),
                       "forward: layer 0 has no weights, load them first", std::runtime_error);
  load(layer, step);
  CHECK_THROWS_WITH_AS(
      layer.backward(step.backward_args()),
      "backward: got no saved forward pass of layer 0, expected a forward_sft with save_for_backward first",
      std::runtime_error);
  layer.forward_sft(step.forward_args(), true);
  BackwardArgs fewer = step.backward_args();
  fewer.num_tokens = kTokens - 1;
  CHECK_THROWS_WITH_AS(layer.backward(fewer),
                       "grad_output: got 36 tokens, expected 37 as in the forward pass",
                       std::invalid_argument);
  ExpertWeights weights = step.model.expert_weights();
  CHECK_THROWS_WITH_AS(
      layer.load_weights(weights),
      "load_weights: got 1 forward passes of layer 0 that wait for their backward pass, expected none",
      std::runtime_error);
  layer.backward(step.backward_args());
  CHECK(step.bits() == train({1, {0}, {1}}, Topology::read()));
}

TEST_CASE("adapters that are given when they are made are those of an update") {
  CHECK(MOESFTConfig{}.lora_rank == 16);
  CHECK(MOESFTConfig{}.lora_alpha == 32.0);
  const MOESFTConfig config = training_config(one_thread());
  const std::vector<float> wide(kExperts * lora_shape(config, LoraId::kDownB).size(), 1.0f / 3);
  const Step step(config);
  LoraSources sources = step.sources();
  sources[static_cast<size_t>(LoraId::kUpA)] = {};
  sources[static_cast<size_t>(LoraId::kDownB)] = {wide.data(), kernels::FloatType::kFloat32};
  const LoraWeights made(config, sources);
  LoraWeights updated(config);
  updated.update(sources, *config.pool);
  for (size_t i = 0; i < kNumLora; ++i) {
    const auto id = static_cast<LoraId>(i);
    for (size_t e = 0; e < kExperts; ++e)
      CHECK(std::memcmp(made.view(id, e).data, updated.view(id, e).data,
                        lora_shape(config, id).size() * sizeof(bf16)) == 0);
  }
}

TEST_CASE("a training config names the first field that cannot be used") {
  const auto refused = [](auto&& change, const char* message) {
    MOESFTConfig config = training_config(one_thread());
    change(config);
    CHECK_THROWS_WITH_AS(config.validate(), message, std::invalid_argument);
  };
  refused([](MOESFTConfig& c) { c.lora_rank = -1; }, "lora_rank: got -1, expected 0 to 4096");
  refused([](MOESFTConfig& c) { c.lora_alpha = 1.0 / 0.0; }, "lora_alpha: got inf, expected a finite number");
  refused([](MOESFTConfig& c) { c.lora_alpha = 1e300; },
          "lora_alpha: got 1e+300, expected less: the scale of the adapters overflows float32");
  refused([](MOESFTConfig& c) { c.lora_dropout = 1.0; },
          "lora_dropout: got 1, expected at least 0 and below 1");
  refused([](MOESFTConfig& c) { c.max_cache_depth = 0; }, "max_cache_depth: got 0, expected 1 to 1048576");
  refused([](MOESFTConfig& c) { c.layer_idx = int64_t{1} << 31; },
          "layer_idx: got 2147483648, expected below 2147483648");
  refused([](MOESFTConfig& c) { c.hidden_size = 0; }, "hidden_size: got 0, expected 1 to 16777216");
}

}  // namespace ktmoe
