// Common to the parts of a layer: its weights, the current call, and the steps of a pass that no
// part owns. Compiled once, for inference and training alike.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "core/function_ref.h"
#include "moe/layer/gemm_kernel.h"
#include "moe/layer/interface.h"
#include "moe/layer/pass_stats.h"
#include "moe/plan/layer_call.h"
#include "moe/plan/scratch_plan.h"

namespace ktmoe {

class SharedLayer {
 public:
  SharedLayer(const SharedLayer&) = delete;
  SharedLayer& operator=(const SharedLayer&) = delete;

 protected:
  // Throws as GeneralMOEConfig::validate() does.
  SharedLayer(GeneralMOEConfig config, GemmKernel kernel);
  ~SharedLayer() = default;

  // ---- weights ----

  // Throws std::invalid_argument when the numbers of matrices or biases do not fit the config.
  void check_weights(const ExpertWeights& weights) const;
  // Swaps checked weights in. On one node the parts read the caller's memory. On several nodes each part gets
  // its own rows, copied once, and the caller's memory is released: every byte is stored once either way.
  void take_weights(ExpertWeights& weights);
  const ExpertMatrices& matrices_of(size_t part) const {
    return nodes_.empty() ? weights_.matrices : nodes_[part].matrices;
  }
  // Throws std::runtime_error when no weights are loaded.
  ProjectionFormats loaded_formats() const;
  // As activation_blocks() throws, for the loaded weights, or before that those of the method.
  void check_products(ActivationDtype dtype) const;
  // All rows of an expert, wherever they are.
  ExpertRows rows_of(uint32_t expert) const;

  // ---- stats and traces ----

  void start_stats(bool on);
  bool has_stats() const;
  PassStats read_stats(bool reset);

  // Measures a pass, or a phase of it, for as long as a scope lives: for stats and for the engine's trace.
  // Both cost a branch while neither is asked for.
  class PassScope {
   public:
    explicit PassScope(SharedLayer& layer) : layer_(layer), begin_(layer.stats_ ? TaskTrace::now_ns() : 0) {}
    ~PassScope() {
      if (layer_.stats_) layer_.stats_->nanoseconds += TaskTrace::now_ns() - begin_;
    }
    PassScope(const PassScope&) = delete;
    PassScope& operator=(const PassScope&) = delete;

   private:
    SharedLayer& layer_;
    const int64_t begin_;
  };
  class PhaseScope {
   public:
    PhaseScope(SharedLayer& layer, Phase phase);
    ~PhaseScope();
    PhaseScope(const PhaseScope&) = delete;
    PhaseScope& operator=(const PhaseScope&) = delete;

   private:
    SharedLayer& layer_;
    const bool is_measured_;
    const int64_t begin_;
  };
  friend class PhaseScope;

  // ---- the steps of a pass; the caller has locked mutex_ ----

  // Makes the plan. Throws as MoE_Interface::forward() does.
  void begin_forward(const ForwardArgs& args);
  // Counts the readings of experts by a backward pass.
  void count_backward();

  // Which projections take int8 blocks. Throws as activation_blocks() does.
  void choose_products(ActivationDtype dtype);

  // Makes the inputs of a layer that scales them by the routing weights [T, P].
  void run_scale_inputs(const float* weights);
  size_t scaled_bytes() const;
  void place_scaled(std::byte* at);

  // Before int8 products: the inputs, and the intermediate, to int8.
  void quantize_inputs();
  void quantize_intermediate();
  void invalidate_packed();

  // At most as many rows as one block of an operand of k inputs has.
  uint32_t most_rows(uint32_t k) const;
  // As many sweeps over the hidden size as keep the fp32 results of the down projection within a budget that
  // fits in the last-level cache.
  uint32_t num_sweeps() const;
  // Too little work to wake the other workers for it.
  bool is_tiny() const;

  // The fp32 results of the down projection, one block per part; none in zero sweeps.
  std::vector<size_t> take_y(ScratchPlan& plan, uint32_t sweeps) const;

  // Runs counts_[i] tasks in sub-pool i.
  void run_counts(TaskFn task);
  // Tasks that no part owns, shared by all threads: function(worker, task).
  void run_tasks(Phase phase, uint32_t num_tasks, FunctionRef<void(uint32_t, uint32_t)> function);

  uint32_t hidden_size() const { return static_cast<uint32_t>(config_.hidden_size); }
  uint32_t intermediate_size() const { return static_cast<uint32_t>(config_.intermediate_size); }

  // The quantized activations that products take, in borrowed scratch.
  struct QuantizedScratch {
    void take(const SharedLayer& layer, ScratchPlan& plan);
    void place(SharedLayer& layer, std::byte* base) const;

   private:
    size_t x_ = 0, h_ = 0, x_blocks_[2] = {}, h_blocks_ = 0;
  };

  // What a forward pass of inference borrows.
  struct InferenceScratch {
    ScratchPlan plan;
    std::vector<size_t> y;
    InferenceScratch(const SharedLayer& layer, uint32_t sweeps);
    void place(SharedLayer& layer, std::byte* base) const;

   private:
    std::vector<size_t> h_;
    size_t h_rows_ = 0, scaled_ = 0;
    QuantizedScratch quantized_;
    size_t workers_ = 0, per_worker_ = 0, operand_ = 0, c_ = 0;
  };

  GeneralMOEConfig config_;
  const GemmKernel kernel_;
  std::vector<OutputShare> shares_;  // one per part
  ExpertWeights weights_;
  std::vector<NodeMatrices> nodes_;  // one per part when the engine spans several nodes, else none
  bool loaded_ = false;
  std::optional<PassStats> stats_;  // while they are collected
  Phase phase_ = Phase::kRoute;     // that is being computed
  LayerCall call_;
  std::vector<uint32_t> counts_;  // tasks of each part in the current step
  mutable std::mutex mutex_;      // one call at a time, even if two engines are given tasks of this layer

 private:
  bool spans_nodes() const;
  PassStats no_stats() const;
  void count_forward(const ForwardArgs& args);
  // Gives `run` the tasks, recorded if the engine is being traced.
  void traced(TaskFn task, FunctionRef<void(TaskFn)> run);
  void quantize_rows(const kernels::RowsView& rows, uint32_t num_rows, uint32_t k,
                     const kernels::Int8Rows& to);
  void quantize_blocks(const kernels::RowsView& rows, uint32_t num_rows, uint32_t k, uint32_t block,
                       std::byte* to);
  // function(first, count) for rows of k elements, by all threads where that is worth it.
  void run_rows(uint32_t num_rows, uint32_t k, FunctionRef<void(uint32_t, uint32_t)> function);

  std::atomic<ProjectionFormats> formats_;  // of the loaded weights
};

}  // namespace ktmoe
