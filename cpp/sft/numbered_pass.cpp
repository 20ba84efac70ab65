#include "sft/numbered_pass.h"

#include <atomic>
#include <vector>

namespace ktmoe {

uint32_t next_pass_number() {
  static std::atomic<uint32_t> last{0};
  uint32_t number = 0;
  while (number == 0) number = ++last;
  return number;
}

void forward_numbered(MoE_SFT_Interface& layer, const LoraSources& lora, const ForwardArgs& args,
                      uint32_t number) {
  const bool save = number != 0;
  if (save) layer.forget_forwards();
  layer.update_lora_weights(lora);
  layer.forward_sft(args, save, number);
}

void backward_numbered(MoE_SFT_Interface& layer, const LoraSources& lora, ForwardArgs forward,
                       uint32_t number, const BackwardArgs& args) {
  if (number == 0 || !layer.is_last(number, args.num_tokens)) {
    std::vector<bf16> out(size_t{args.num_tokens} * static_cast<size_t>(layer.config().hidden_size));
    forward.out = out.data(), forward.out_type = kernels::FloatType::kBf16;
    forward_numbered(layer, lora, forward, next_pass_number());
  }
  layer.backward(args);
}

}  // namespace ktmoe
