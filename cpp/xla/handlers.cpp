#include "xla/handlers.h"

#include "sft/numbered_pass.h"
#include "xla/batch.h"
#include "xla/cuda_calls.h"
#include "xla/deferred.h"
#include "xla/host_task.h"

namespace ktmoe::xla {
namespace {

LoraSources take_lora(Call& call, const MOESFTConfig& c) {
  LoraSources sources;
  for (size_t i = 0; i < kNumLora; ++i) {
    const LoraShape shape = lora_shape(c, static_cast<LoraId>(i));
    if (shape.size() == 0) continue;
    const Buffer& buffer = call.next_arg(shape.name);
    const bool is_bf16 = buffer.dtype == DataType::kBf16;
    const void* data = elements_of(buffer, shape.name, is_bf16 ? DataType::kBf16 : DataType::kFloat32,
                                   c.expert_num * static_cast<int64_t>(shape.size()));
    sources[i] = {data, is_bf16 ? kernels::FloatType::kBf16 : kernels::FloatType::kFloat32};
  }
  return sources;
}

void do_forward(Call& call) {
  const Batch batch(call);
  const CalledLayer& called = *batch.called();
  ForwardArgs args = batch.rows();
  args.out = batch.take_out(call);
  ChunkedPass pass(called.layer, args, batch.ids(), called.chunk_size);
  run(*called.engine, pass.num_chunks(), [&](size_t chunk) { pass.compute(chunk); });
}

void do_forward_sft(Call& call) {
  const Batch batch(call);
  const LoraSources lora = take_lora(call, batch.training().sft_config());
  void* out = batch.take_out(call);
  run(*batch.called()->engine, [&] { forward_numbered(batch.training(), lora, batch.args(out), 0); });
}

void do_forward_saved(Call& call) {
  const Batch batch(call);
  const LoraSources lora = take_lora(call, batch.training().sft_config());
  void* out = batch.take_out(call);
  auto* pass = static_cast<uint32_t*>(elements_of(call.next_result("pass"), "pass", DataType::kUint32, 1));
  *pass = next_pass_number();
  run(*batch.called()->engine, [&] { forward_numbered(batch.training(), lora, batch.args(out), *pass); });
}

// The gradients of the adapters, if the call has them among its results.
void take_lora_gradients(Call& call, const MOESFTConfig& c, BackwardArgs& args) {
  if (call.num_results() == 2) return;
  for (size_t i = 0; i < kNumLora; ++i) {
    const LoraShape shape = lora_shape(c, static_cast<LoraId>(i));
    if (shape.size() == 0) continue;
    args.lora[i] =
        static_cast<float*>(elements_of(call.next_result(shape.name), shape.name, DataType::kFloat32,
                                        c.expert_num * static_cast<int64_t>(shape.size())));
  }
}

void do_backward(Call& call) {
  const Batch batch(call);
  MoE_SFT_Interface& layer = batch.training();
  const MOESFTConfig& c = layer.sft_config();
  const LoraSources lora = take_lora(call, c);
  const uint32_t pass =
      *static_cast<uint32_t*>(elements_of(call.next_arg("pass"), "pass", DataType::kUint32, 1));
  const int64_t tokens = batch.num_tokens();
  BackwardArgs args;
  args.num_tokens = static_cast<uint32_t>(tokens);
  args.grad_output =
      rows_of(call.next_arg("grad_output"), "grad_output", DataType::kBf16, c.hidden_size, tokens).as<bf16>();
  args.grad_input =
      rows_of(call.next_result("grad_input"), "grad_input", DataType::kBf16, c.hidden_size, tokens)
          .as<bf16>();
  args.grad_weights = rows_of(call.next_result("grad_weights"), "grad_weights", DataType::kFloat32,
                              c.num_experts_per_tok, tokens)
                          .as<float>();
  take_lora_gradients(call, c, args);
  run(*batch.called()->engine, [&] { backward_numbered(layer, lora, batch.args(nullptr), pass, args); });
}

constexpr Operation kForward{"moe_forward", do_forward};
constexpr Operation kForwardSft{"moe_sft", do_forward_sft};
constexpr Operation kForwardSaved{"moe_sft", do_forward_saved};
constexpr Operation kBackward{"moe_sft backward", do_backward};
constexpr Operation kForwardDeferred{"moe_forward_deferred", do_forward_deferred};
constexpr Operation kDrainDeferred{"moe_drain_deferred", do_drain_deferred};

}  // namespace

Error* forward(CallFrame* frame) { return handle(frame, kForward); }
Error* forward_sft(CallFrame* frame) { return handle(frame, kForwardSft); }
Error* forward_saved(CallFrame* frame) { return handle(frame, kForwardSaved); }
Error* backward(CallFrame* frame) { return handle(frame, kBackward); }
Error* forward_deferred(CallFrame* frame) { return handle(frame, kForwardDeferred); }
Error* drain_deferred(CallFrame* frame) { return handle(frame, kDrainDeferred); }

namespace on_cuda {
Error* forward(CallFrame* frame) { return enqueue(frame, kForward); }
Error* forward_sft(CallFrame* frame) { return enqueue(frame, kForwardSft); }
Error* forward_saved(CallFrame* frame) { return enqueue(frame, kForwardSaved); }
Error* backward(CallFrame* frame) { return enqueue(frame, kBackward); }
Error* forward_deferred(CallFrame* frame) { return enqueue(frame, kForwardDeferred); }
Error* drain_deferred(CallFrame* frame) { return enqueue(frame, kDrainDeferred); }
}  // namespace on_cuda

std::span<const PlatformHandlers> all_handlers() {
  static constexpr PlatformHandlers all[] = {
      {"forward", forward, on_cuda::forward},
      {"forward_sft", forward_sft, on_cuda::forward_sft},
      {"forward_saved", forward_saved, on_cuda::forward_saved},
      {"backward", backward, on_cuda::backward},
      {"forward_deferred", forward_deferred, on_cuda::forward_deferred},
      {"drain_deferred", drain_deferred, on_cuda::drain_deferred},
  };
  return all;
}

}  // namespace ktmoe::xla
