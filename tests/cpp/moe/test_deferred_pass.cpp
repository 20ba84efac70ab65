// Passes that defer experts: every state, with the bits of two passes, and what becomes of a failure.
#include "moe/deferred_pass.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "layer_model.h"
#include "moe/layer/tp_moe.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

constexpr size_t kRows = kTokens * kHidden, kRoutes = kTokens * kPerToken;

std::shared_ptr<TP_MOE> make_layer(const Model& model) {
  auto layer = std::make_shared<TP_MOE>(
      make_config(std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {2}}, Topology::read())),
      GemmKernel224BF);
  ExpertWeights weights = model.expert_weights();
  layer->load_weights(weights);
  return layer;
}

struct Case {
  Model model;
  std::shared_ptr<TP_MOE> layer = make_layer(model);
  std::vector<float> out = std::vector<float>(kRows, 7.0f), sums = std::vector<float>(kRows, 7.0f);
  std::vector<int64_t> immediate = std::vector<int64_t>(kRoutes), deferred = std::vector<int64_t>(kRoutes);
  std::vector<bf16> copied_x = std::vector<bf16>(kRows);
  std::vector<float> copied_weights = std::vector<float>(kRoutes);
  std::shared_ptr<DeferredOutput> output =
      std::make_shared<DeferredOutput>(sums.data(), layer->config(), kTokens);

  Case() {
    for (size_t i = 0; i < kRoutes; ++i) model.weights[i] = i % 2 == 0 ? 0.75f : 0.25f;
  }

  // Each expert is of one part alone, or all of them are of both.
  void route(bool is_joint) {
    for (size_t i = 0; i < kRoutes; ++i)
      model.ids[i] = is_joint ? static_cast<int64_t>(i % 5) : static_cast<int64_t>(i % 2);
  }

  ForwardArgs args() {
    ForwardArgs args;
    args.num_tokens = kTokens;
    args.hidden_states = model.x.data(), args.topk_weights = model.weights.data();
    args.out = out.data(), args.out_type = kernels::FloatType::kFloat32;
    return args;
  }

  std::unique_ptr<DeferredPass> pass(std::shared_ptr<const DeferredOutput> received = nullptr) {
    DeferringBatch batch;
    batch.args = args();
    batch.ids = model.ids.data();
    batch.num_deferred = 1, batch.chunk_size = 10;
    batch.immediate_ids = immediate.data(), batch.deferred_ids = deferred.data();
    batch.copied_hidden_states = copied_x.data(), batch.copied_weights = copied_weights.data();
    return std::make_unique<DeferredPass>(layer, batch, std::move(received), output);
  }

  std::vector<float> alone(const std::vector<int64_t>& ids, const float* base) {
    std::vector<float> result(kRows);
    ForwardArgs whole = args();
    whole.topk_ids = ids.data(), whole.base = base, whole.out = result.data();
    layer->forward(whole);
    return result;
  }
};

void compute(DeferredPass& pass) {
  pass.split();
  for (size_t i = 0; i < pass.num_chunks(); ++i) pass.compute_immediate(i);
  for (size_t i = 0; i < pass.num_chunks(); ++i) pass.compute_deferred(i);
}

}  // namespace

TEST_CASE("deferred pass: both parts have the bits of passes of their own") {
  for (const bool is_joint : {false, true}) {
    Case first, second;
    first.route(is_joint), second.route(is_joint);
    const auto before = first.pass(), after = second.pass(first.output);
    compute(*before), compute(*after);
    CHECK(after->is_joint() == is_joint);
    first.output->wait_until_ready(), second.output->wait_until_ready();
    CHECK(first.sums == first.alone(first.deferred, nullptr));
    CHECK(second.out == second.alone(second.immediate, first.sums.data()));
    CHECK(second.sums == second.alone(second.deferred, nullptr));
    std::vector<bf16> rounded(kRows);
    second.output->round_to(rounded.data());
    for (size_t i = 0; i < kRows; ++i) CHECK(rounded[i].bits == to_bf16(second.sums[i]).bits);
  }
}

TEST_CASE("deferred pass: the output is ready behind the last chunk that writes it") {
  for (const bool is_joint : {false, true}) {
    Case c;
    c.route(is_joint);
    const auto pass = c.pass();
    pass->split();
    std::thread waiting([&] { c.output->wait_until_ready(); });
    for (size_t i = 0; i < pass->num_chunks(); ++i) pass->compute_immediate(i);
    for (size_t i = 0; !is_joint && i < pass->num_chunks(); ++i) pass->compute_deferred(i);
    waiting.join();
    CHECK_NOTHROW(c.output->rethrow());
  }
}

TEST_CASE("deferred pass: a round that fails leaves NaN and its error, and the next one neither") {
  Case first, second;
  first.route(false), second.route(false);
  const auto before = first.pass(), after = second.pass(first.output);
  first.model.ids.back() = kExperts;
  CHECK_THROWS_AS(before->check_ids(), std::out_of_range);
  CHECK_THROWS_AS(before->split(), std::out_of_range);
  for (size_t i = 0; i < before->num_chunks(); ++i) before->compute_immediate(i), before->compute_deferred(i);
  first.output->wait_until_ready();
  CHECK(first.out == std::vector<float>(kRows, 7.0f));
  for (const float sum : first.sums) CHECK(std::isnan(sum));
  CHECK_THROWS_AS(first.output->rethrow(), std::out_of_range);

  after->split();
  CHECK_THROWS_AS(after->compute_immediate(0), std::out_of_range);
  after->compute_immediate(1);
  CHECK(second.out == std::vector<float>(kRows, 7.0f));
  CHECK_THROWS_AS(second.output->rethrow(), std::out_of_range);

  first.model.ids.back() = 1;
  compute(*before), compute(*after);
  CHECK_NOTHROW(second.output->rethrow());
  CHECK(second.out == second.alone(second.immediate, first.sums.data()));
}

TEST_CASE("deferred pass: what does not fit") {
  Case c;
  const auto pass = c.pass();
  CHECK_THROWS_WITH_AS(pass->compute_immediate(0),
                       "deferred pass: got a part of it that was not split, expected its split first",
                       std::runtime_error);
  CHECK_THROWS_AS(pass->compute_deferred(0), std::runtime_error);
  const auto other = std::make_shared<DeferredOutput>(c.sums.data(), c.layer->config(), 36);
  CHECK_THROWS_WITH_AS(c.pass(other),
                       "hidden_states: got [37, 96], expected [36, 96] like the deferred output of layer 0",
                       std::invalid_argument);
}
