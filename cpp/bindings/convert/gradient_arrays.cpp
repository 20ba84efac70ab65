#include "bindings/convert/gradient_arrays.h"

#include "core/error.h"

namespace ktmoe::bindings {

template <class T>
T* GradientArrays::write(nb::handle target, const char* name, DType dtype, const Dims& shape) {
  const Array a = Array::write(target, name);
  a.expect({dtype}, shape).expect_contiguous();
  for (const Array& other : arrays_) a.expect_disjoint(other);
  return arrays_.emplace_back(a).as<T>();
}

template <class T>
T* GradientArrays::write_if_given(nb::handle target, const char* name, DType dtype, const Dims& shape,
                                  bool of_up) {
  if (target.is_none()) return nullptr;
  check_lora_exists(config_, name, of_up);
  return write<T>(target, name, dtype, shape);
}

GradientArrays::GradientArrays(const MOESFTConfig& c, nb::handle grad_output, nb::handle grad_input,
                               nb::handle grad_weights, Output output)
    : config_(c) {
  arrays_.reserve(12);
  const Array& q = arrays_.emplace_back(Array::read(grad_output, "grad_output"));
  q.expect({DType::kBf16}, {"T", c.hidden_size}).expect_contiguous();
  const int64_t tokens = q.shape(0);
  if (tokens * c.num_experts_per_tok > INT32_MAX)
    throw_invalid("grad_output: got ", tokens, " tokens, expected fewer in one call");
  args_.num_tokens = static_cast<uint32_t>(tokens), args_.grad_output = q.as<bf16>();
  if (output == Output::kSums) {
    args_.grad_input = write<bf16>(grad_input, "grad_input", DType::kBf16, {tokens, c.hidden_size});
  } else {
    const Array& rows = arrays_.emplace_back(Array::write(grad_input, "grad_input"));
    args_.grad_expert_rows = expert_rows(rows, c.hidden_size, args_.num_expert_rows);
    rows.expect_disjoint(q);
  }
  args_.grad_weights =
      write<float>(grad_weights, "grad_weights", DType::kFloat32, {tokens, c.num_experts_per_tok});
}

void GradientArrays::write_lora(const LoraHandles& handles) {
  for (size_t i = 0; i < kNumLora; ++i)
    args_.lora[i] = write_if_given<float>(handles[i], lora_name(config_, i), DType::kFloat32,
                                          lora_dims(config_, i), is_up_lora(i));
}

void GradientArrays::write_projections(nb::handle gate, nb::handle up, nb::handle down) {
  const MOESFTConfig& c = config_;
  const Dims first = {c.expert_num, c.intermediate_size, c.hidden_size};
  args_.gate_proj = write_if_given<float>(gate, "gate_proj", DType::kFloat32, first);
  args_.up_proj = write_if_given<float>(up, "up_proj", DType::kFloat32, first, true);
  args_.down_proj = write_if_given<float>(down, "down_proj", DType::kFloat32,
                                          {c.expert_num, c.hidden_size, c.intermediate_size});
}

}  // namespace ktmoe::bindings
