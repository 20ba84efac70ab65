// Inputs scaled by routing weights: which rows are made, and what a layer computes with them.
#include <doctest/doctest.h>

#include <vector>

#include "kernels/table.h"
#include "layer_model.h"
#include "moe/layer/scaled_inputs.h"
#include "moe/layer/tp_moe.h"

namespace ktmoe {
namespace {

using namespace ktmoe::test;
struct Layer : TP_MOE {
  explicit Layer(const GeneralMOEConfig& config) : TP_MOE(config, GemmKernel224BF) {}
};

std::vector<uint16_t> forward(const Model& model, bool scale_inputs, const std::vector<float>& weights,
                              const WorkerPoolConfig& threads = {1, {0}, {1}}) {
  auto config = make_config(std::make_shared<WorkerPool>(threads, Topology::read()));
  config.scale_inputs = scale_inputs;
  Layer layer(config);
  ExpertWeights given = model.expert_weights();
  layer.load_weights(given);
  std::vector<bf16> out(kTokens * kHidden);
  ForwardArgs args;
  args.num_tokens = kTokens;
  args.hidden_states = model.x.data(), args.topk_ids = model.ids.data(), args.topk_weights = weights.data();
  args.out = out.data();
  layer.forward(args);
  std::vector<uint16_t> bits;
  for (bf16 value : out) bits.push_back(value.bits);
  return bits;
}

}  // namespace

TEST_CASE("rows go where the plan has them, skipped slots nowhere") {
  const std::vector<int64_t> ids = {2, 0, -1, 2, 1, 1};
  RoutingPlan plan;
  plan.build(ids.data(), 3, 2, 3, nullptr);
  const std::vector<bf16> x = random_values(3 * 5, 2);
  const std::vector<float> weights = {0.5f, 2.0f, 9.0f, -1.0f, 0.25f, 4.0f};
  std::vector<bf16> to(plan.num_rows() * 5);
  scale_inputs(kernels::active_table(), plan, x.data(), weights.data(), 2, 5, 0, 2, to.data());
  scale_inputs(kernels::active_table(), plan, x.data(), weights.data(), 2, 5, 2, 3, to.data());
  for (size_t i = 0; i < ids.size(); ++i)
    for (size_t j = 0; ids[i] >= 0 && j < 5; ++j)
      CHECK(to[static_cast<size_t>(plan.row[i]) * 5 + j].bits ==
            to_bf16(weights[i] * to_float(x[i / 2 * 5 + j])).bits);
}

TEST_CASE("weights of one make no difference, others do, and threads do not") {
  const Model model;
  const std::vector<float> ones(kTokens * kPerToken, 1.0f);
  CHECK(forward(model, true, ones) == forward(model, false, ones));
  const auto one = forward(model, true, model.weights);
  CHECK(one != forward(model, false, model.weights));
  CHECK(one == forward(model, true, model.weights, {1, {0}, {3}}));
  CHECK(one == forward(model, true, model.weights, {3, {0, 0, 0}, {1, 2, 1}}));
}

}  // namespace ktmoe
