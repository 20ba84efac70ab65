// The arguments that all calls of a layer have.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

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

  // Of a pass that writes to `out`.
  ForwardArgs args(void* out) const;

  void* take_out(Call& call) const;

 private:
  void take_ids(const Buffer& buffer);

  std::shared_ptr<CalledLayer> called_;
  std::vector<int64_t> ids_;
  ForwardArgs args_;
};

}  // namespace ktmoe::xla
