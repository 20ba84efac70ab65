// The arrays of a forward pass, checked, and the arguments made of them.
#pragma once

#include <memory>
#include <optional>

#include "bindings/convert/arrays.h"
#include "moe/layer/interface.h"

namespace ktmoe::bindings {

inline kernels::FloatType float_type(const Array& a) {
  return a.dtype() == DType::kBf16 ? kernels::FloatType::kBf16 : kernels::FloatType::kFloat32;
}

class ForwardArrays {
 public:
  // Throws TypeError and ValueError for what is not as it should be.
  ForwardArrays(const GeneralMOEConfig& config, nb::handle hidden_states, nb::handle topk_ids,
                nb::handle topk_weights, nb::handle out, nb::handle skip_experts);

  void add_to_out();
  void add_to(nb::handle base);
  // Only these tokens of the batch are computed; all from the first on when there is no number.
  void take_tokens(int64_t first, std::optional<int64_t> number);

  // IndexError for an id of any token of the batch: no part of it is computed when another part is refused.
  void check_ids(const GeneralMOEConfig& config) const;

  // ValueError when an array shares memory with one of the batch; with a base it may.
  void expect_disjoint_from(const Array& other) const;

  const ForwardArgs& args() const { return args_; }

  // One more that the pass refers to.
  void hold(const Array& array) { arrays_->push_back(array); }
  const std::shared_ptr<Arrays>& arrays() const { return arrays_; }

 private:
  const Array& array(size_t i) const { return (*arrays_)[i]; }
  const Array& out() const { return array(3); }

  std::shared_ptr<Arrays> arrays_;  // hidden states, ids, weights, out, and what else the arguments refer to
  ForwardArgs args_;
  size_t base_row_bytes_ = 0;
};

}  // namespace ktmoe::bindings
