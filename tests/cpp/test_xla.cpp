// Calls from XLA, as it would make them: what a handler answers, and which errors come of wrong arrays.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "core/types.h"
#include "runtime_helpers.h"
#include "sft/tp_moe_sft.h"
#include "xla/call.h"
#include "xla/handlers.h"
#include "xla/layers.h"

using namespace ktmoe;
using namespace ktmoe::test;
using namespace ktmoe::xla;

namespace {

struct Raised {
  ErrorCode code;
  std::string message;
};
std::vector<Raised> raised;

Error* create_error(ErrorCreateArgs* args) {
  raised.push_back({args->code, args->message});
  return reinterpret_cast<Error*>(&raised);
}

const Api kApi = {sizeof(Api), nullptr, {sizeof(ApiVersion), nullptr, 0, 3}, nullptr, create_error};

// Arrays of a call and the frame around them.
class Frame {
 public:
  template <class T>
  Frame& arg(DataType dtype, std::vector<int64_t> dims, T* data) {
    return add(args_, dtype, std::move(dims), data);
  }
  template <class T>
  Frame& ret(DataType dtype, std::vector<int64_t> dims, T* data) {
    return add(rets_, dtype, std::move(dims), data);
  }

  // The error that the handler gives, or "".
  std::string call(Handler* handler, int32_t stage = kExecuteStage) {
    CallFrame frame{sizeof(CallFrame), nullptr, &kApi, nullptr, stage, args_.buffers(), rets_.buffers(), {}};
    raised.clear();
    if (handler(&frame) == nullptr) return "";
    REQUIRE(raised.size() == 1);
    return raised[0].message;
  }

 private:
  struct List {
    std::vector<std::vector<int64_t>> dims;
    std::vector<Buffer> all;
    std::vector<int32_t> types;
    std::vector<void*> values;

    Buffers buffers() {
      values.clear(), types.assign(all.size(), kIsBuffer);
      for (size_t i = 0; i < all.size(); ++i) {
        all[i].dims = dims[i].data();
        values.push_back(&all[i]);
      }
      return {sizeof(Buffers), nullptr, static_cast<int64_t>(all.size()), types.data(), values.data()};
    }
  };

  template <class T>
  Frame& add(List& list, DataType dtype, std::vector<int64_t> dims, T* data) {
    list.all.push_back({sizeof(Buffer), nullptr, dtype, data, static_cast<int64_t>(dims.size()), nullptr});
    list.dims.push_back(std::move(dims));
    return *this;
  }

  List args_, rets_;
};

// A layer of one expert whose weights are ones: E, P, H and I are 1, 1, 4 and 2, the activation is relu
// squared.
class OnesLayer {
 public:
  OnesLayer() {
    engine_ = std::make_shared<CPUInfer>(2);
    MOESFTConfig config{{1, 1, 4, 2, 0, {}, engine_->backend()}};
    config.activation.kind = kernels::ActivationKind::kRelu2, config.activation.gated = false;
    config.lora_rank = 1, config.lora_alpha = 1;
    auto layer = std::make_shared<TP_MOE_SFT>(config, native_kernel<FormatId::kBf16>(config));
    ExpertWeights weights;
    weights.matrices.gate = {view(4)}, weights.matrices.down = {view(2)};
    layer->load_weights(weights);
    called_ = std::make_shared<CalledLayer>();
    called_->engine = engine_, called_->layer = layer, called_->training = layer;
    number = Layers::all().add(called_);
  }
  ~OnesLayer() { Layers::all().remove(number); }

  CalledLayer& called() { return *called_; }

  int32_t number = 0;

 private:
  WeightView view(uint32_t columns) {
    WeightView v{reinterpret_cast<const std::byte*>(ones_), static_cast<ptrdiff_t>(columns * sizeof(bf16)),
                 columns};
    v.format = FormatId::kBf16;
    return v;
  }

  const bf16 ones_[8] = {to_bf16(1), to_bf16(1), to_bf16(1), to_bf16(1),
                         to_bf16(1), to_bf16(1), to_bf16(1), to_bf16(1)};
  std::shared_ptr<CPUInfer> engine_;
  std::shared_ptr<CalledLayer> called_;
};

struct Arrays {
  bf16 x[4] = {to_bf16(1), to_bf16(1), to_bf16(1), to_bf16(1)}, out[4] = {}, grad_input[4] = {};
  int32_t ids[1] = {0};
  float weights[1] = {0.5f}, grad_weights[1] = {};
  float gate_a[4] = {}, gate_b[2] = {}, down_a[2] = {}, down_b[4] = {};
  uint32_t pass[1] = {};

  Frame forward(OnesLayer& layer) {
    return Frame()
        .arg(DataType::kInt32, {}, &layer.number)
        .arg(DataType::kBf16, {1, 1, 4}, x)
        .arg(DataType::kInt32, {1, 1, 1}, ids)
        .arg(DataType::kFloat32, {1, 1, 1}, weights);
  }
  Frame with_adapters(OnesLayer& layer) {
    return forward(layer)
        .arg(DataType::kFloat32, {1, 1, 4}, gate_a)
        .arg(DataType::kFloat32, {1, 2, 1}, gate_b)
        .arg(DataType::kFloat32, {1, 1, 2}, down_a)
        .arg(DataType::kFloat32, {1, 4, 1}, down_b);
  }
};

}  // namespace

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
  const Addresses seen = last_addresses();
  CHECK(seen.hidden_states == a.x);
  CHECK(seen.out == a.out);
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
  CHECK(a.forward(layer).call(xla::forward, 0) == "moe_forward: got stage 0, expected to execute");
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
