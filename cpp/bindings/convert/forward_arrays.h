// The arrays of a forward pass, checked, and the arguments made of them.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "bindings/convert/arrays.h"
#include "moe/layer/interface.h"

namespace ktmoe::bindings {

inline kernels::FloatType float_type(const Array& a) {
  return a.dtype() == DType::kBf16 ? kernels::FloatType::kBf16 : kernels::FloatType::kFloat32;
}

// Of a call; nothing for the layer's. Throws ValueError for another name, or one that the layer refuses.
ActivationDtype activation_dtype_of(const MoE_Interface& layer, const std::optional<std::string>& name);
// Of a config.
ActivationDtype activation_dtype_of(const std::optional<std::string>& name);

// What a pass writes: the sums of tokens [T, H], or the rows of their experts, float32 [S, H].
enum class Output { kSums, kExpertRows };

// Rows of experts [S, H], S below 2^31. Throws TypeError and ValueError for another array.
float* expert_rows(const Array& array, int64_t hidden_size, uint32_t& num_rows);

class ForwardArrays {
 public:
  // Throws TypeError and ValueError for invalid arguments.
  ForwardArrays(const GeneralMOEConfig& config, nb::handle hidden_states, nb::handle topk_ids,
                nb::handle topk_weights, nb::handle out, nb::handle skip_experts,
                Output output = Output::kSums);

  void set_activation_dtype(ActivationDtype dtype) { args_.activation_dtype = dtype; }
  // The adapter of each token; None for none.
  void set_adapters(nb::handle adapters);
  void add_to_out();
  void add_to(nb::handle base);

  // ValueError when the output shares memory with another array.
  void expect_out_disjoint_from(const Array& other) const { out().expect_disjoint(other); }

  const ForwardArgs& args() const { return args_; }

  // Hidden states, ids, weights, out, and what else the arguments refer to.
  const std::shared_ptr<Arrays>& arrays() const { return arrays_; }
  static constexpr size_t kIds = 1;  // among them

 private:
  const Array& out() const { return (*arrays_)[3]; }

  std::shared_ptr<Arrays> arrays_;
  ForwardArgs args_;
};

}  // namespace ktmoe::bindings
