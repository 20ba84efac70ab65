// Experts cut in slices: nodes that have parts of the rows write the bytes that one node writes.
#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <vector>

#include "core/aligned_buffer.h"
#include "formats/registry.h"
#include "layer_model.h"
#include "moe/layer/tp_moe.h"

namespace ktmoe {
namespace {

using namespace ktmoe::test;

using Bytes = std::vector<std::byte>;

// One expert of any bytes.
struct Expert {
  FormatId format;
  uint32_t width, hidden;
  std::mt19937 random;
  std::vector<Bytes> memory;

  Bytes& draw(size_t bytes) {
    Bytes& drawn = memory.emplace_back(bytes);
    for (std::byte& b : drawn) b = static_cast<std::byte>(random());
    return drawn;
  }
  WeightView matrix(uint32_t rows, uint32_t columns) {
    const size_t row_bytes = format_row_bytes(format, columns);
    WeightView w{draw(rows * row_bytes).data(), static_cast<ptrdiff_t>(row_bytes), columns};
    w.format = format;
    if (format_has_channel_scale(format))
      w.channel_scale = reinterpret_cast<const float*>(draw(rows * sizeof(float)).data());
    if (const uint32_t serves = format_scale_rows(format)) {
      const size_t bytes = format_scale_bytes(format, columns);
      w.block_scales = draw(div_up(rows, serves) * bytes).data();
      w.block_scales_stride_bytes = static_cast<ptrdiff_t>(bytes);
    }
    return w;
  }
  ExpertWeights weights() {
    ExpertWeights w;
    w.matrices = {{matrix(width, hidden)}, {matrix(width, hidden)}, {matrix(hidden, width)}};
    return w;
  }
};

// The arrays of all slices, one after the other.
std::vector<Bytes> written(FormatId format, uint32_t width, uint32_t hidden, uint32_t num_slices,
                           const WorkerPoolConfig& threads, const Topology& topology) {
  GeneralMOEConfig config;
  config.expert_num = config.num_experts_per_tok = 1;
  config.hidden_size = hidden, config.intermediate_size = width;
  config.pool = std::make_shared<WorkerPool>(threads, topology);
  TP_MOE layer(config, GemmKernel{format, false});
  Expert expert{format, width, hidden, std::mt19937(1), {}};
  ExpertWeights weights = expert.weights();
  layer.load_weights(weights);

  const SliceShapes shapes = shapes_of_slices(config, layer.formats(), num_slices);
  ExpertSlices slices;
  slices.formats = layer.formats();
  std::vector<Bytes> arrays;
  arrays.reserve(size_t{6} * num_slices);
  const auto array = [&](size_t bytes) { return arrays.emplace_back(bytes).data(); };
  for (uint32_t i = 0; i < num_slices; ++i) {
    for (const bool is_first : {true, false}) {
      const SliceShape& shape = is_first ? shapes.w13 : shapes.w2;
      SliceArrays to;
      to.weights = array(shape.num_rows * shape.row_bytes);
      if (shape.num_scale_rows != 0) to.scales = array(shape.num_scale_rows * shape.scale_bytes);
      if (shape.has_channel_scale) to.channel_scale = array(shape.num_rows * sizeof(float));
      (is_first ? slices.w13 : slices.w2).push_back(to);
    }
  }
  layer.write_expert(slices);
  return arrays;
}

}  // namespace

TEST_CASE("nodes write the slices that one node writes") {
  struct Case {
    FormatId format;
    uint32_t width, hidden, num_slices;
  };
  // With blocks of 128 x 128 the nodes' shares of 192 rows end within a block.
  for (const Case& c : {Case{FormatId::kBf16, 70, 96, 1}, Case{FormatId::kBf16, 210, 193, 3},
                        Case{FormatId::kFp8, 384, 150, 3}, Case{FormatId::kFp8, 290, 384, 1},
                        Case{FormatId::kNvFp4, 192, 131, 4}, Case{FormatId::kInt4Group32, 192, 131, 2},
                        Case{FormatId::kInt8Group32, 192, 131, 2}, Case{FormatId::kQ4K, 512, 256, 2}}) {
    CAPTURE(static_cast<int>(c.format));
    const auto on = [&](const WorkerPoolConfig& threads, const Topology& topology) {
      return written(c.format, c.width, c.hidden, c.num_slices, threads, topology);
    };
    const auto one = on({1, {0}, {1}}, Topology::read());
    CHECK(one == on({2, {0, 0}, {1, 2}}, Topology::read()));
    CHECK(one == on({2, {0, 1}, {1, 1}}, two_nodes()));
    CHECK(one == on({3, {1, 0, 1}, {1, 1, 1}}, two_nodes()));
  }
}

TEST_CASE("slices of a layer without weights") {
  TP_MOE layer(make_config(std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {1}})), GemmKernel224BF);
  const char* message = "layer 0 has no weights, load them first";
  CHECK_THROWS_WITH_AS(layer.formats(), message, std::runtime_error);
  CHECK_THROWS_WITH_AS(layer.write_expert({}), message, std::runtime_error);
}

}  // namespace ktmoe
