// What XLA's programs call: forward passes, those with adapters, backward passes, and deferred experts.
#pragma once

#include <span>

#include "xla/abi.h"

namespace ktmoe::xla {

// Arguments, T being the product of leading dimensions:
//   layer int32 [], hidden_states bf16 [.., H], topk_ids int32 or int64 [.., P], topk_weights float32 [.., P]
// Results: out bf16 [.., H].
Error* forward(CallFrame* frame);

// The same and then the adapters, float32 or bf16, those of up only with a gate, none when the rank is 0:
//   gate_lora_a [E, R, H], gate_lora_b [E, I, R], up_lora_a, up_lora_b, down_lora_a [E, R, I],
//   down_lora_b [E, H, R]
Error* forward_sft(CallFrame* frame);

// The same, and the pass is saved for its backward pass until the layer is called again. Results: out, and
// pass uint32 [], its number.
Error* forward_saved(CallFrame* frame);

// Arguments: those of forward_sft, pass uint32 [], grad_output bf16 [.., H]. The pass is computed again if
// it is no longer saved. Results: grad_input bf16 [.., H], grad_weights float32 [.., P], then float32
// gradients of all adapters, or of none.
Error* backward(CallFrame* frame);

// The arguments of forward, carry uint32 []: the number of the previous layer's deferred output, or 0.
// Results: out, which begins with that, and carry uint32 [], the number of this layer's deferred output, or
// 0.
Error* forward_deferred(CallFrame* frame);

// Arguments: carry uint32 []. Results: out bf16 [.., H], the deferred output.
Error* drain_deferred(CallFrame* frame);

// The same on arrays of a GPU, in its program's stream: arrays are copied to the host and back. Neither the
// caller waits nor does the GPU but where the results are needed. An error that a call meets is that of a
// later one; its results are NaN.
namespace on_cuda {
Error* forward(CallFrame* frame);
Error* forward_sft(CallFrame* frame);
Error* forward_saved(CallFrame* frame);
Error* backward(CallFrame* frame);
Error* forward_deferred(CallFrame* frame);
Error* drain_deferred(CallFrame* frame);
}  // namespace on_cuda

struct PlatformHandlers {
  const char* name;
  Handler *on_host, *on_cuda;
};
// All of them, by name.
std::span<const PlatformHandlers> all_handlers();

}  // namespace ktmoe::xla
