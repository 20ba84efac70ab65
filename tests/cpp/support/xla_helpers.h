// Calls as XLA would make them: frames of arrays, and a layer to be called.
#pragma once

#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/types.h"
#include "sft/tp_moe_sft.h"
#include "xla/call.h"
#include "xla/layers.h"

namespace ktmoe::test {

using namespace ktmoe::xla;

struct Raised {
  ErrorCode code;
  std::string message;
};
inline std::vector<Raised> raised;

inline Error* create_error(ErrorCreateArgs* args) {
  raised.push_back({args->code, args->message});
  return reinterpret_cast<Error*>(&raised);
}

inline void* stream = nullptr;  // of CUDA, on which calls come
inline bool has_stream = true;

inline Error* get_stream(StreamGetArgs* args) {
  args->stream = stream;
  return has_stream ? nullptr : reinterpret_cast<Error*>(&raised);
}

inline const Api kApi = {sizeof(Api), nullptr,   {sizeof(ApiVersion), nullptr, 0, 3}, nullptr, create_error,
                         {},          get_stream};

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

// A layer that notes the arguments that it is given.
class NotingLayer final : public TP_MOE_SFT {
 public:
  using TP_MOE_SFT::TP_MOE_SFT;
  void forward(const ForwardArgs& args) override {
    forward_args = args;
    TP_MOE_SFT::forward(args);
  }
  void backward(const BackwardArgs& args, TrainingCall* call) override {
    backward_args = args;
    TP_MOE_SFT::backward(args, call);
  }

  ForwardArgs forward_args;  // of the last call
  BackwardArgs backward_args;
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
    layer_ = std::make_shared<NotingLayer>(config, GemmKernel224BF);
    ExpertWeights weights;
    weights.matrices.gate = {view(4)}, weights.matrices.down = {view(2)};
    layer_->load_weights(weights);
    called_ = std::make_shared<CalledLayer>();
    called_->engine = engine_, called_->layer = layer_, called_->training = layer_;
    number = Layers::all().add(called_);
  }
  ~OnesLayer() { Layers::all().remove(number); }

  CalledLayer& called() { return *called_; }
  const ForwardArgs& forward_args() const { return layer_->forward_args; }
  const BackwardArgs& backward_args() const { return layer_->backward_args; }

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
  std::shared_ptr<NotingLayer> layer_;
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

}  // namespace ktmoe::test
