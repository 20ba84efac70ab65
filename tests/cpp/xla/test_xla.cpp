// Calls from XLA, as it would make them: what a handler answers, and which errors come of wrong arrays.
#include "xla/handlers.h"

#include "xla_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;
using namespace ktmoe::xla;

TEST_CASE("xla: a handler says which interface it speaks, and computes nothing then") {
  Metadata metadata{};
  MetadataExtension asked{{sizeof(Extension), kMetadataExtension, nullptr}, &metadata};
  CallFrame frame{};
  frame.api = &kApi, frame.extensions = &asked.base;
  CHECK(xla::forward(&frame) == nullptr);
  CHECK(metadata.version.major_version == 0);
  CHECK(metadata.version.minor_version == 3);
}

TEST_CASE("xla: a forward pass") {
  OnesLayer layer;
  Arrays a;
  CHECK(a.forward(layer).ret(DataType::kBf16, {1, 1, 4}, a.out).call(xla::forward) == "");
  for (const bf16 y : a.out) CHECK(to_float(y) == 16.0f);  // 0.5 (4^2 + 4^2)
  CHECK(layer.forward_args().hidden_states == a.x);        // nothing is copied
  CHECK(layer.forward_args().topk_weights == a.weights);
  CHECK(layer.forward_args().out == a.out);
}

TEST_CASE("xla: a backward pass goes back through the pass that is kept, or through a new one") {
  OnesLayer layer;
  Arrays a;
  for (float& number : a.gate_a) number = 0.25f;
  CHECK(a.with_adapters(layer)
            .ret(DataType::kBf16, {1, 1, 4}, a.out)
            .ret(DataType::kUint32, {}, a.pass)
            .call(forward_saved) == "");
  CHECK(a.pass[0] != 0);
  for (const bool kept : {true, false}) {
    CHECK(layer.called().training->is_last(a.pass[0], 1) == kept);
    CHECK(!layer.called().training->is_last(a.pass[0], 2));
    Arrays b;
    float grad_gate_b[2] = {}, rest[4] = {};
    CHECK(a.with_adapters(layer)
              .arg(DataType::kUint32, {}, a.pass)
              .arg(DataType::kBf16, {1, 1, 4}, a.x)
              .ret(DataType::kBf16, {1, 1, 4}, b.grad_input)
              .ret(DataType::kFloat32, {1, 1, 1}, b.grad_weights)
              .ret(DataType::kFloat32, {1, 1, 4}, rest)
              .ret(DataType::kFloat32, {1, 2, 1}, grad_gate_b)
              .ret(DataType::kFloat32, {1, 1, 2}, rest)
              .ret(DataType::kFloat32, {1, 4, 1}, rest)
              .call(backward) == "");
    for (const bf16 g : b.grad_input) CHECK(to_float(g) == 32.0f);  // 0.5 4 (2 4 + 2 4)
    CHECK(b.grad_weights[0] == 128.0f);                             // 4 (4^2 + 4^2)
    for (const float g : grad_gate_b) CHECK(g == 16.0f);            // (0.5 4 2 4) (4 0.25)
    CHECK(layer.called().training->num_cached() == 0);
    CHECK(layer.backward_args().grad_output == a.x);  // nothing is copied
    CHECK(layer.backward_args().grad_input == b.grad_input);
  }
}

TEST_CASE("xla: tasks of calls are gone when they have run") {
  OnesLayer layer;
  Arrays a;
  for (int i = 0; i < 3; ++i) a.forward(layer).ret(DataType::kBf16, {1, 1, 4}, a.out).call(xla::forward);
  CHECK(layer.called().engine->num_completed() == 3);
  CHECK(layer.called().engine->take_finished().empty());
}

TEST_CASE("xla: what is wrong with a call is its error") {
  OnesLayer layer;
  Arrays a;
  const auto error_of = [&](Frame frame, Handler* handler = xla::forward) {
    return frame.ret(DataType::kBf16, {1, 1, 4}, a.out).call(handler);
  };
  int32_t gone = 1 << 30;
  CHECK(error_of(Frame()) == "moe_forward: layer: got none, expected an array");
  CHECK(error_of(Frame().arg(DataType::kFloat32, {2}, a.x)) ==
        "moe_forward: layer: got float32 [2], expected 1 of int32");
  CHECK(error_of(Frame().arg(DataType::kInt32, {}, &gone)) ==
        "moe_forward: the layer is gone, expected one that lives as long as the programs that call it");
  CHECK(raised[0].code == ErrorCode::kFailedPrecondition);
  const auto begin = [&] { return Frame().arg(DataType::kInt32, {}, &layer.number); };
  CHECK(error_of(begin().arg(DataType::kFloat32, {1, 4}, a.x)) ==
        "moe_forward: hidden_states: got float32 [1, 4], expected bfloat16 [T, 4]");
  CHECK(raised[0].code == ErrorCode::kInvalidArgument);
  CHECK(error_of(begin().arg(DataType::kBf16, {1, 3}, a.x)) ==
        "moe_forward: hidden_states: got bfloat16 [1, 3], expected bfloat16 [T, 4]");
  CHECK(error_of(begin().arg(DataType::kBf16, {1, 4}, a.x).arg(DataType::kInt32, {2, 1}, a.ids)) ==
        "moe_forward: topk_ids: got int32 [2, 1], expected int32 [1, 1]");
  CHECK(a.forward(layer).call(xla::forward) == "moe_forward: out: got none, expected an array");
  CHECK(a.forward(layer).call(xla::forward, 0) == "moe_forward: stage: got 0, expected 3");
  CHECK(error_of(a.forward(layer), forward_sft) == "moe_sft: gate_lora_a: got none, expected an array");
  a.ids[0] = 1;
  CHECK(error_of(a.forward(layer)).starts_with("moe_forward: topk_ids: got expert 1 at [0, 0]"));
  CHECK(raised[0].code == ErrorCode::kOutOfRange);
  layer.called().training = nullptr;
  CHECK(error_of(a.forward(layer), forward_sft) ==
        "moe_sft: layer: got one for inference, expected one that trains");
  layer.called().engine->shutdown();
  a.ids[0] = 0;
  CHECK(error_of(a.forward(layer)) != "");
}
