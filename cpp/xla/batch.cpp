#include "xla/batch.h"

#include <climits>
#include <cstddef>

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
  args_.activation_dtype = called_->activation_dtype;
  if (!called_->skip_experts.empty()) args_.skip_experts = called_->skip_experts.data();
}

MoE_SFT_Interface& Batch::training() const {
  if (called_->training == nullptr) throw_invalid("layer: got one for inference, expected one that trains");
  return *called_->training;
}

ForwardArgs Batch::args(void* out) const {
  ForwardArgs args = args_;
  args.out = out;
  if (const auto* narrow = std::get_if<const int32_t*>(&ids_)) {
    const size_t num = size_t{args_.num_tokens} * static_cast<size_t>(config().num_experts_per_tok);
    if (wide_ids_.size() != num) wide_ids_.assign(*narrow, *narrow + num);
    args.topk_ids = wide_ids_.data();
  } else {
    args.topk_ids = std::get<const int64_t*>(ids_);
  }
  return args;
}

void* Batch::take_out(Call& call) const {
  return rows_of(call.next_result("out"), "out", DataType::kBf16, config().hidden_size, num_tokens())
      .as<void>();
}

// JAX mostly has them in int32.
void Batch::take_ids(const Buffer& buffer) {
  const bool is_wide = buffer.dtype == DataType::kInt64;
  const Rows rows = rows_of(buffer, "topk_ids", is_wide ? DataType::kInt64 : DataType::kInt32,
                            config().num_experts_per_tok, args_.num_tokens);
  if (is_wide) {
    ids_ = rows.as<const int64_t>();
  } else {
    ids_ = rows.as<const int32_t>();
  }
}

}  // namespace ktmoe::xla
