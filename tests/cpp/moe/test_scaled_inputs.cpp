// Inputs scaled by routing weights: the rows to the bit, and dot products whose order is that of the blocks.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "layer_model.h"
#include "moe/layer/scaled_inputs.h"
#include "moe/layer/tp_moe.h"

namespace ktmoe {
namespace {

using namespace ktmoe::test;
struct Layer : TP_MOE {
  explicit Layer(const GeneralMOEConfig& config) : TP_MOE(config, GemmKernel224BF) {}
};

std::vector<bf16> scaled(const std::vector<bf16>& x, float w) {
  std::vector<bf16> to(x.size());
  scale_row(x.data(), w, x.size(), to.data());
  return to;
}

bool is_nan(bf16 value) { return std::isnan(to_float(value)); }

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

TEST_CASE("a scaled row is the product rounded to nearest even") {
  const std::vector<bf16> x = random_values(77, 1);
  const std::vector<bf16> got = scaled(x, 0.7f);
  for (size_t i = 0; i < x.size(); ++i) CHECK(got[i].bits == to_bf16(0.7f * to_float(x[i])).bits);
  // 1 + 2^-7 and 1 + 3 2^-7, times 1.5, lie halfway between two neighbours.
  const bf16 next{0x3f81};
  CHECK(scaled({next}, 1.5f)[0].bits == 0x3fc2);
  CHECK(scaled({bf16{0x3f83}}, 1.5f)[0].bits == 0x3fc4);
  CHECK(scaled({next}, 0.0f)[0].bits == 0);
  CHECK(scaled({next}, -0.0f)[0].bits == 0x8000);
}

TEST_CASE("a scaled row that is not finite is all NaN") {
  constexpr float kInf = std::numeric_limits<float>::infinity(),
                  kNaN = std::numeric_limits<float>::quiet_NaN();
  const std::vector<bf16> ones(40, to_bf16(1.0f));
  for (float bad : {kInf, -kInf, kNaN}) {
    std::vector<bf16> x = ones;
    x[39] = to_bf16(bad);
    for (float w : {1.0f, 0.0f})
      for (bf16 value : scaled(x, w)) CHECK(is_nan(value));
    for (bf16 value : scaled(ones, bad)) CHECK(is_nan(value));
  }
  std::vector<bf16> large = ones;
  large[3] = bf16{0x7f7f};  // the largest
  for (bf16 value : scaled(large, 2.0f)) CHECK(is_nan(value));
  for (bf16 value : scaled(large, 1.004f)) CHECK(is_nan(value));  // a float32, but not a bf16
  for (bf16 value : scaled(large, 1.0f)) CHECK_FALSE(is_nan(value));
}

TEST_CASE("rows go where the plan has them, skipped slots nowhere") {
  const std::vector<int64_t> ids = {2, 0, -1, 2, 1, 1};
  RoutingPlan plan;
  plan.build(ids.data(), 3, 2, 3, nullptr);
  const std::vector<bf16> x = random_values(3 * 5, 2);
  const std::vector<float> weights = {0.5f, 2.0f, 9.0f, -1.0f, 0.25f, 4.0f};
  std::vector<bf16> to(plan.num_rows() * 5);
  scale_inputs(plan, x.data(), weights.data(), 2, 5, 0, 2, to.data());
  scale_inputs(plan, x.data(), weights.data(), 2, 5, 2, 3, to.data());
  for (size_t i = 0; i < ids.size(); ++i)
    for (size_t j = 0; ids[i] >= 0 && j < 5; ++j)
      CHECK(to[static_cast<size_t>(plan.row[i]) * 5 + j].bits ==
            to_bf16(weights[i] * to_float(x[i / 2 * 5 + j])).bits);
}

TEST_CASE("dot products by blocks do not depend on where columns are cut") {
  for (size_t size : {1u, 7u, 32u, 33u, 70u, 96u}) {
    const std::vector<bf16> x = random_values(size, 3);
    std::vector<float> grad(size), whole((size + 31) / 32), cut(whole.size());
    std::mt19937 random(4);
    for (float& g : grad) g = std::normal_distribution<float>()(random);
    dot_by_blocks(grad.data(), x.data(), size, whole.data());
    for (size_t b = 0; b < cut.size(); ++b) {
      const size_t begin = b * 32, end = std::min(begin + 32, size);
      dot_by_blocks(grad.data() + begin, x.data() + begin, end - begin, &cut[b]);
      double exact = 0, magnitude = 0;
      for (size_t i = begin; i < end; ++i) {
        exact += double{grad[i]} * to_float(x[i]);
        magnitude += std::abs(double{grad[i]} * to_float(x[i]));
      }
      CHECK(std::abs(whole[b] - exact) <= 10 * 0x1p-24 * magnitude);
    }
    CHECK(cut == whole);
  }
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
