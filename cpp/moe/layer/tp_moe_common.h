// A layer shared by the engine's sub-pools: each has a part, the outputs of gate, up and down are cut between
// them, nothing is reduced across them. Common to inference and training.
#pragma once

#include <memory>
#include <vector>

#include "core/function_ref.h"
#include "moe/layer/shared_layer.h"

namespace ktmoe {

// `Interface` is MoE_Interface or a class that extends it. Defined in tp_moe_common-inl.h, which is compiled
// where a layer is: tp_moe.cpp and tp_moe_sft.cpp.
template <class Part, class Interface = MoE_Interface>
class TP_MOE_Common : public Interface, protected SharedLayer {
 public:
  TP_MOE_Common(GeneralMOEConfig config, GemmKernel kernel);

  const GeneralMOEConfig& config() const override { return config_; }
  const GemmKernel& kernel() const override { return kernel_; }
  bool loaded() const override { return loaded_; }
  ProjectionFormats formats() const override { return loaded_formats(); }
  void check_activation_dtype(ActivationDtype dtype) const override { check_products(dtype); }
  void collect_stats(bool on) override { start_stats(on); }
  bool collects_stats() const override { return has_stats(); }
  PassStats stats(bool reset) override { return read_stats(reset); }

  void load_weights(ExpertWeights& weights) override;
  void forward(const ForwardArgs& args) override;
  void write_expert(const ExpertSlices& slices) override;

 protected:
  // Throws when the layer's weights must not change now.
  virtual void check_before_load() {}

  // ---- the steps of a pass that parts compute; the caller has locked mutex_ ----

  void run_gate_up();
  void run_down(uint32_t sweeps);
  void run_combine();

  void place_y(const std::vector<size_t>& y, std::byte* base);
  void for_parts(FunctionRef<void(Part&, int)> function);
  // Runs the tasks that `count` counts, of all parts.
  void run_parts(Phase phase, uint32_t (Part::*count)() const,
                 FunctionRef<void(const Worker&, Part&, uint32_t)> task);

  std::vector<std::unique_ptr<Part>> parts_;
};

}  // namespace ktmoe
