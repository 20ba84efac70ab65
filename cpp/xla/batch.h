// The arguments that all calls of a layer have.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "moe/chunked_pass.h"
#include "xla/call.h"
#include "xla/layers.h"

namespace ktmoe::xla {

class Batch {
 public:
  explicit Batch(Call& call);
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  const std::shared_ptr<CalledLayer>& called() const { return called_; }
  const GeneralMOEConfig& config() const { return called_->layer->config(); }
  int64_t num_tokens() const { return args_.num_tokens; }
  // std::invalid_argument when the layer is one for inference.
  MoE_SFT_Interface& training() const;

  // Of a pass over all tokens at once that writes to `out`.
  ForwardArgs args(void* out) const;

  // Of a pass that takes ids of either size: without ids and `out`.
  const ForwardArgs& rows() const { return args_; }
  Integers ids() const { return ids_; }

  void* take_out(Call& call) const;

 private:
  void take_ids(const Buffer& buffer);

  std::shared_ptr<CalledLayer> called_;
  Integers ids_;
  mutable std::vector<int64_t> wide_ids_;  // of args(), which takes int64; made when first needed
  ForwardArgs args_;
};

}  // namespace ktmoe::xla
