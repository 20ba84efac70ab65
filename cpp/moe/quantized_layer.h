// Layers whose weight format follows from the config's group size: a method is one class, whatever the
// groups.
#pragma once

#include <memory>

#include "moe/interface.h"

namespace ktmoe {

// A layer that is one of several.
class QuantizedLayer : public MoE_Interface {
 public:
  const GeneralMOEConfig& config() const override { return layer_->config(); }
  FormatId format() const override { return layer_->format(); }
  bool loaded() const override { return layer_->loaded(); }
  void load_weights(ExpertWeights& weights) override { layer_->load_weights(weights); }
  void forward(const ForwardArgs& args) override { layer_->forward(args); }

 protected:
  explicit QuantizedLayer(std::unique_ptr<MoE_Interface> layer) : layer_(std::move(layer)) {}

 private:
  std::unique_ptr<MoE_Interface> layer_;
};

// Integer products. Throw std::invalid_argument for a group size that the format does not have.
class AMXInt8Layer final : public QuantizedLayer {
 public:
  explicit AMXInt8Layer(const GeneralMOEConfig& config);  // scales of rows
};
class AMXInt4Layer final : public QuantizedLayer {
 public:
  explicit AMXInt4Layer(const GeneralMOEConfig& config);  // groups of 32 (the default), 64, 128
};

// Weights are decoded to bf16.
class Int8Layer final : public QuantizedLayer {
 public:
  explicit Int8Layer(const GeneralMOEConfig& config);  // scales of rows (the default) or of groups of 32
};
class Int4Layer final : public QuantizedLayer {
 public:
  explicit Int4Layer(const GeneralMOEConfig& config);  // groups of 32 (the default), 64, 128
};

}  // namespace ktmoe
