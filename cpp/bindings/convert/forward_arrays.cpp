#include "bindings/convert/forward_arrays.h"

#include "core/error.h"

namespace ktmoe::bindings {

ActivationDtype activation_dtype_of(const std::optional<std::string>& name) {
  if (!name) return ActivationDtype::kDefault;
  if (*name == "bfloat16") return ActivationDtype::kBf16;
  if (*name == "int8") return ActivationDtype::kInt8;
  throw_invalid("activation_dtype: got '", *name, "', expected None, 'bfloat16' or 'int8'");
}

ActivationDtype activation_dtype_of(const MoE_Interface& layer, const std::optional<std::string>& name) {
  const ActivationDtype dtype = activation_dtype_of(name);
  layer.check_activation_dtype(dtype);
  return dtype;
}

float* expert_rows(const Array& array, int64_t hidden_size, uint32_t& num_rows) {
  array.expect({DType::kFloat32}, {"S", hidden_size}).expect_contiguous();
  if (array.shape(0) > INT32_MAX)
    throw_invalid(array.name(), ": got ", array.shape(0), " rows, expected fewer in one call");
  num_rows = static_cast<uint32_t>(array.shape(0));
  return array.as<float>();
}

ForwardArrays::ForwardArrays(const GeneralMOEConfig& c, nb::handle hidden_states, nb::handle topk_ids,
                             nb::handle topk_weights, nb::handle out, nb::handle skip_experts, Output output)
    : arrays_(std::make_shared<Arrays>()) {
  arrays_->reserve(8);
  const Array& x = arrays_->emplace_back(Array::read(hidden_states, "hidden_states"));
  x.expect({DType::kBf16}, {"T", c.hidden_size}).expect_contiguous();
  const int64_t batch = x.shape(0);
  const Array& ids = arrays_->emplace_back(Array::read(topk_ids, "topk_ids"));
  ids.expect({DType::kInt64}, {batch, c.num_experts_per_tok}).expect_contiguous();
  const Array& w = arrays_->emplace_back(Array::read(topk_weights, "topk_weights"));
  w.expect({DType::kFloat32}, {batch, c.num_experts_per_tok}).expect_contiguous();
  const Array& y = arrays_->emplace_back(Array::write(out, output == Output::kSums ? "out" : "expert_rows"));
  if (output == Output::kSums) {
    y.expect({DType::kBf16, DType::kFloat32}, {batch, c.hidden_size}).expect_contiguous();
    args_.out = y.as<void>(), args_.out_type = float_type(y);
  } else {
    args_.expert_rows = expert_rows(y, c.hidden_size, args_.num_expert_rows);
  }
  for (const Array* other : {&x, &ids, &w}) y.expect_disjoint(*other);
  if (batch * c.num_experts_per_tok > INT32_MAX)
    throw_invalid("hidden_states: got ", batch, " tokens, expected fewer in one call");

  args_.num_tokens = static_cast<uint32_t>(batch);
  args_.hidden_states = x.as<bf16>();
  args_.topk_ids = ids.as<int64_t>();
  args_.topk_weights = w.as<float>();
  if (!skip_experts.is_none()) {
    const Array& skip = arrays_->emplace_back(Array::read(skip_experts, "skip_experts"));
    // Libraries that know no bool export masks as uint8.
    const DType mask = skip.dtype() == DType::kUint8 ? DType::kUint8 : DType::kBool;
    skip.expect({mask}, {c.expert_num}).expect_contiguous();
    args_.skip_experts = skip.as<uint8_t>();
  }
}

void ForwardArrays::set_adapters(nb::handle adapters) {
  if (adapters.is_none()) return;
  const Array& a = arrays_->emplace_back(Array::read(adapters, "adapters"));
  a.expect({DType::kInt32}, {out().shape(0)}).expect_contiguous();
  out().expect_disjoint(a);
  args_.adapters = a.as<int32_t>();
}

void ForwardArrays::add_to_out() { args_.base = args_.out, args_.base_type = args_.out_type; }

void ForwardArrays::add_to(nb::handle base) {
  const Array& b = arrays_->emplace_back(Array::read(base, "base"));
  b.expect({DType::kBf16, DType::kFloat32}, {out().shape(0), out().shape(1)}).expect_contiguous();
  out().expect_disjoint(b);
  args_.base = b.as<void>(), args_.base_type = float_type(b);
}

}  // namespace ktmoe::bindings
