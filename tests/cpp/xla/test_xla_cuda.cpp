// Calls from XLA's programs on a GPU, by a driver that needs none: they return at once, the stream brings
// results and errors.
#include <cmath>

#include "fake_cuda.h"
#include "runtime/stream_session.h"
#include "xla/handlers.h"
#include "xla_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;
using namespace ktmoe::xla;

namespace {

// The stream of the calls that follow.
struct OnStream {
  OnStream() { test::stream = fake_cuda().create_stream(); }
  ~OnStream() { test::stream = nullptr; }
  void synchronize() const { fake_cuda().synchronize(test::stream); }
};

Frame forward_of(Arrays& a, OnesLayer& layer) {
  return a.forward(layer).ret(DataType::kBf16, {1, 1, 4}, a.out);
}

}  // namespace

TEST_CASE("xla on cuda: a forward pass comes in its turn") {
  OnesLayer layer;
  Arrays a;
  const OnStream stream;
  fake_cuda().stall(test::stream, 100);
  a.ids[0] = -1;
  CHECK(forward_of(a, layer).call(on_cuda::forward) == "");
  a.ids[0] = 0;  // what is there when the stream comes to the call counts
  for (const bf16 y : a.out) CHECK(to_float(y) == 0.0f);
  stream.synchronize();
  for (const bf16 y : a.out) CHECK(to_float(y) == 16.0f);
}

TEST_CASE("xla on cuda: larger calls behind smaller ones, before any is done") {
  OnesLayer layer;
  const OnStream stream;
  fake_cuda().stall(test::stream, 50);
  constexpr int64_t kTokens[] = {1, 400'000, 3, 800'000, 2};
  std::vector<std::vector<bf16>> xs, outs;
  for (const int64_t tokens : kTokens) {
    xs.emplace_back(static_cast<size_t>(tokens) * 4, to_bf16(1));
    outs.emplace_back(static_cast<size_t>(tokens) * 4, to_bf16(0));
  }
  std::vector<int32_t> ids(800'000, 0);
  std::vector<float> weights(800'000, 0.5f);
  for (size_t i = 0; i < xs.size(); ++i)
    CHECK(Frame()
              .arg(DataType::kInt32, {}, &layer.number)
              .arg(DataType::kBf16, {kTokens[i], 4}, xs[i].data())
              .arg(DataType::kInt32, {kTokens[i], 1}, ids.data())
              .arg(DataType::kFloat32, {kTokens[i], 1}, weights.data())
              .ret(DataType::kBf16, {kTokens[i], 4}, outs[i].data())
              .call(on_cuda::forward) == "");
  stream.synchronize();
  for (const std::vector<bf16>& out : outs) {
    bool all = true;
    for (const bf16 y : out) all = all && to_float(y) == 16.0f;
    CHECK(all);
  }
}

TEST_CASE("xla on cuda: a pass with adapters and back") {
  OnesLayer layer;
  Arrays a;
  const OnStream stream;
  float grad[4] = {}, grad_gate_b[2] = {};
  for (float& number : a.gate_a) number = 0.25f;
  CHECK(a.with_adapters(layer)
            .ret(DataType::kBf16, {1, 1, 4}, a.out)
            .ret(DataType::kUint32, {}, a.pass)
            .call(on_cuda::forward_saved) == "");
  CHECK(a.with_adapters(layer)
            .arg(DataType::kUint32, {}, a.pass)
            .arg(DataType::kBf16, {1, 1, 4}, a.x)
            .ret(DataType::kBf16, {1, 1, 4}, a.grad_input)
            .ret(DataType::kFloat32, {1, 1, 1}, a.grad_weights)
            .ret(DataType::kFloat32, {1, 1, 4}, grad)
            .ret(DataType::kFloat32, {1, 2, 1}, grad_gate_b)
            .ret(DataType::kFloat32, {1, 1, 2}, grad)
            .ret(DataType::kFloat32, {1, 4, 1}, grad)
            .call(on_cuda::backward) == "");
  CHECK(a.with_adapters(layer).ret(DataType::kBf16, {1, 1, 4}, a.out).call(on_cuda::forward_sft) == "");
  stream.synchronize();
  CHECK(a.pass[0] != 0);
  CHECK(layer.called().training->num_cached() == 0);
  for (const bf16 g : a.grad_input) CHECK(to_float(g) == 32.0f);
  CHECK(a.grad_weights[0] == 128.0f);
  for (const float g : grad_gate_b) CHECK(g == 16.0f);
  for (const bf16 y : a.out) CHECK(to_float(y) == 16.0f);
}

TEST_CASE("xla on cuda: deferred experts") {
  OnesLayer layer;
  layer.called().num_deferred = 1;
  Arrays a, b;
  const OnStream stream;
  uint32_t none[1] = {0}, first[1] = {}, second[1] = {};
  bf16 left[4] = {};
  CHECK(a.forward(layer)
            .arg(DataType::kUint32, {}, none)
            .ret(DataType::kBf16, {1, 1, 4}, a.out)
            .ret(DataType::kUint32, {}, first)
            .call(on_cuda::forward_deferred) == "");
  b.weights[0] = 1.0f;
  CHECK(b.forward(layer)
            .arg(DataType::kUint32, {}, first)
            .ret(DataType::kBf16, {1, 1, 4}, b.out)
            .ret(DataType::kUint32, {}, second)
            .call(on_cuda::forward_deferred) == "");
  CHECK(Frame()
            .arg(DataType::kUint32, {}, second)
            .ret(DataType::kBf16, {1, 4}, left)
            .call(on_cuda::drain_deferred) == "");
  stream.synchronize();
  for (const bf16 y : a.out) CHECK(to_float(y) == 0.0f);
  for (const bf16 y : b.out) CHECK(to_float(y) == 16.0f);
  for (const bf16 y : left) CHECK(to_float(y) == 32.0f);
}

TEST_CASE("xla on cuda: an error is that of a later call") {
  OnesLayer layer;
  Arrays a;
  const OnStream stream;
  a.ids[0] = 1;
  CHECK(forward_of(a, layer).call(on_cuda::forward) == "");
  stream.synchronize();
  for (const bf16 y : a.out) CHECK(std::isnan(to_float(y)));
  a.ids[0] = 0;
  CHECK(forward_of(a, layer).call(on_cuda::forward).starts_with("moe_forward: topk_ids: got expert 1 at"));
  CHECK(raised[0].code == ErrorCode::kOutOfRange);
  CHECK(forward_of(a, layer).call(on_cuda::forward) == "");
  stream.synchronize();
  for (const bf16 y : a.out) CHECK(to_float(y) == 16.0f);
  a.ids[0] = 1;
  CHECK(forward_of(a, layer).call(on_cuda::forward) == "");
  stream.synchronize();
  // It may as well be told by who has calls in streams, since there is one pending error in a process.
  CHECK_THROWS_AS(StreamSession::of_process().rethrow(), std::out_of_range);
  StreamSession::of_process().rethrow();
}

TEST_CASE("xla on cuda: what is wrong with a call") {
  OnesLayer layer;
  Arrays a;
  const OnStream stream;
  fake_cuda().capture(test::stream, true);
  CHECK(forward_of(a, layer).call(on_cuda::forward) ==
        "moe_forward: stream: got one that is being captured, expected a program that is run call by call");
  fake_cuda().capture(test::stream, false);
  CHECK(Frame().arg(static_cast<DataType>(1), {1}, a.x).call(on_cuda::forward) ==
        "moe_forward: arrays: got another dtype, expected bfloat16, float32, int32, uint32 or int64");
  has_stream = false;
  CHECK(forward_of(a, layer).call(on_cuda::forward) == "moe_forward: XLA gives no stream");
  has_stream = true;
}
