#include "xla/batch.h"

#include <climits>

#include "core/error.h"

namespace ktmoe::xla {

Batch::Batch(Call& call) {
  const Buffer& number = call.next_arg("layer");
  called_ = Layers::all().at(*static_cast<int32_t*>(elements_of(number, "layer", DataType::kInt32, 1)));
  const GeneralMOEConfig& c = config();
  const Rows x = rows_of(call.next_arg("hidden_states"), "hidden_states", DataType::kBf16, c.hidden_size);
  if (x.num * c.num_experts_per_tok > INT32_MAX)
    throw_invalid("hidden_states: got ", x.num, " tokens, expected fewer in one call");
  args_.num_tokens = static_cast<uint32_t>(x.num), args_.hidden_states = x.as<bf16>();
  take_ids(call.next_arg("topk_ids"));
  args_.topk_weights =
      rows_of(call.next_arg("topk_weights"), "topk_weights", DataType::kFloat32, c.num_experts_per_tok, x.num)
          .as<float>();
  if (!called_->skip_experts.empty()) args_.skip_experts = called_->skip_experts.data();
}

MoE_SFT_Interface& Batch::training() const {
  if (called_->training == nullptr) throw_invalid("layer: got one for inference, expected one that trains");
  return *called_->training;
}

ForwardArgs Batch::args(void* out) const {
  ForwardArgs args = args_;
  args.out = out;
  return args;
}

void* Batch::take_out(Call& call) const {
  return rows_of(call.next_result("out"), "out", DataType::kBf16, config().hidden_size, num_tokens())
      .as<void>();
}

// The engine takes ids in int64, JAX mostly has them in int32.
void Batch::take_ids(const Buffer& buffer) {
  const GeneralMOEConfig& c = config();
  const bool is_long = buffer.dtype == DataType::kInt64;
  const Rows rows = rows_of(buffer, "topk_ids", is_long ? DataType::kInt64 : DataType::kInt32,
                            c.num_experts_per_tok, args_.num_tokens);
  if (is_long) {
    args_.topk_ids = rows.as<int64_t>();
  } else {
    const auto* begin = rows.as<int32_t>();
    ids_.assign(begin, begin + rows.num * c.num_experts_per_tok);
    args_.topk_ids = ids_.data();
  }
}

}  // namespace ktmoe::xla
