// Forward passes in chunks of tokens have the bits of whole ones, and nothing is computed of a batch that is
// refused in part.
#include "moe/chunked_pass.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "layer_model.h"
#include "moe/layer/tp_moe.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

struct Case {
  Model model;
  std::shared_ptr<TP_MOE> layer = std::make_shared<TP_MOE>(
      make_config(std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {2}}, Topology::read())),
      GemmKernel224BF);
  std::vector<int32_t> narrow_ids{model.ids.begin(), model.ids.end()};
  std::vector<float> base = std::vector<float>(kTokens * kHidden, 0.125f), out;

  Case() {
    ExpertWeights weights = model.expert_weights();
    layer->load_weights(weights);
  }

  std::vector<float> compute(Integers ids, uint32_t chunk_size, uint32_t num_tokens = kTokens) {
    out.assign(kTokens * kHidden, 7.0f);
    ForwardArgs args;
    args.num_tokens = num_tokens;
    args.hidden_states = model.x.data(), args.topk_weights = model.weights.data();
    args.base = base.data();
    args.out = out.data(), args.out_type = kernels::FloatType::kFloat32;
    ChunkedPass pass(layer, args, ids, chunk_size);
    for (size_t i = 0; i < pass.num_chunks(); ++i) pass.compute(i);
    return out;
  }
};

std::vector<std::vector<uint32_t>> cut(uint32_t num_tokens, uint32_t chunk_size) {
  std::vector<std::vector<uint32_t>> found;
  for (const TokenRange& chunk : cut_tokens(num_tokens, chunk_size))
    found.push_back({chunk.first, chunk.num});
  return found;
}

}  // namespace

TEST_CASE("chunks cover a batch") {
  using Chunks = std::vector<std::vector<uint32_t>>;
  CHECK(cut(7, 3) == Chunks{{0, 3}, {3, 3}, {6, 1}});
  CHECK(cut(6, 3) == Chunks{{0, 3}, {3, 3}});
  CHECK(cut(3, 3) == Chunks{{0, 3}});
  CHECK(cut(7, 0) == Chunks{{0, 7}});
  CHECK(cut(0, 3) == Chunks{{0, 0}});
  CHECK(cut(UINT32_MAX, UINT32_MAX - 1) == Chunks{{0, UINT32_MAX - 1}, {UINT32_MAX - 1, 1}});
}

TEST_CASE("chunks do not show in the bits, whatever the size of ids") {
  Case c;
  const std::vector<float> whole = c.compute(c.model.ids.data(), 0);
  for (const uint32_t size : {1u, 10u, 36u, 37u}) {
    CHECK(c.compute(c.model.ids.data(), size) == whole);
    CHECK(c.compute(c.narrow_ids.data(), size) == whole);
  }
  CHECK(c.compute(c.model.ids.data(), 10, 0) == std::vector<float>(kTokens * kHidden, 7.0f));
}

TEST_CASE("a wrong id in the last chunk is an error of all chunks, which compute nothing") {
  Case c;
  c.narrow_ids.back() = kExperts;
  ForwardArgs args;
  args.num_tokens = kTokens;
  args.hidden_states = c.model.x.data(), args.topk_weights = c.model.weights.data();
  c.out.assign(kTokens * kHidden, 7.0f);
  args.out = c.out.data(), args.out_type = kernels::FloatType::kFloat32;
  ChunkedPass pass(c.layer, args, c.narrow_ids.data(), 10);
  REQUIRE(pass.num_chunks() == 4);
  for (size_t i = 0; i < pass.num_chunks(); ++i)
    CHECK_THROWS_WITH_AS(pass.compute(i),
                         "topk_ids: got expert 5 at [36, 1], expected ids below 5 (negative ids are skipped)",
                         std::out_of_range);
  CHECK(c.out == std::vector<float>(kTokens * kHidden, 7.0f));
  c.narrow_ids.back() = 0;  // the pass may be repeated
  for (size_t i = 0; i < pass.num_chunks(); ++i) pass.compute(i);
  c.narrow_ids.back() = kExperts;
  CHECK_THROWS_AS(pass.compute(0), std::out_of_range);
}
