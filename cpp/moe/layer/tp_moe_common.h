// A layer shared by the engine's sub-pools: each has a part, the outputs of gate, up and down are cut between
// them, nothing is reduced across them. Common to inference and training.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/error.h"
#include "formats/registry.h"
#include "kernels/table.h"
#include "moe/layer/gemm_kernel.h"
#include "moe/layer/interface.h"
#include "moe/plan/layer_call.h"
#include "moe/layer/scaled_inputs.h"
#include "moe/plan/scratch_plan.h"

namespace ktmoe {

// `Interface` is MoE_Interface or what extends it.
template <class Part, class Interface = MoE_Interface>
class TP_MOE_Common : public Interface {
 public:
  TP_MOE_Common(GeneralMOEConfig config, GemmKernel kernel) : config_(std::move(config)), kernel_(kernel) {
    config_.validate();
    const uint32_t parts = static_cast<uint32_t>(config_.pool->num_subpools());
    for (uint32_t i = 0; i < parts; ++i) {
      const auto share = [&](int64_t total) {
        return share_of(static_cast<uint32_t>(total), kernels::kOutputBlock, i, parts);
      };
      const OutputShare outputs{share(config_.intermediate_size), share(config_.hidden_size)};
      parts_.push_back(std::make_unique<Part>(config_, kernel_, outputs));
    }
  }

  const GeneralMOEConfig& config() const override { return config_; }
  const GemmKernel& kernel() const override { return kernel_; }
  bool loaded() const override { return loaded_; }

  void load_weights(ExpertWeights& weights) override {
    check(weights);
    const std::lock_guard lock(mutex_);
    check_before_load();
    const ProjectionFormats formats = formats_of(weights.matrices);
    if (spans_nodes()) {
      nodes_ = copy_to_nodes(weights.matrices);
      std::swap(weights.biases, weights_.biases);
      std::swap(weights.logical, weights_.logical);
    } else {
      std::swap(weights, weights_);
    }
    for (size_t i = 0; i < parts_.size(); ++i)
      parts_[i]->set_weights(nodes_.empty() ? &weights_.matrices : &nodes_[i].matrices, &weights_.biases);
    formats_ = formats;
    loaded_ = true;
  }

  void forward(const ForwardArgs& args) override {
    const std::lock_guard lock(mutex_);
    begin(args);
    if (args.num_tokens == 0) return;
    const uint32_t passes = num_passes();
    const Scratch layout(*this, passes);
    const ScratchPool::Lease lease = config_.pool->scratch().lease(layout.plan.bytes());
    layout.place(*this, lease.data());
    run_scale_inputs(args.topk_weights);
    run_gate_up();
    run_down(passes);
  }

  ProjectionFormats formats() const override {
    if (!loaded_) throw_runtime("layer ", config_.layer_idx, " has no weights, load them first");
    return formats_;
  }

  void write_expert(const ExpertSlices& slices) override {
    const std::lock_guard lock(mutex_);
    if (formats() != slices.formats)
      throw_runtime("layer ", config_.layer_idx,
                    " was given weights of another format after the task was made");
    write_slices(config_, rows_of(slices.expert), slices, *config_.pool);
  }

 protected:
  // Throws when the layer's weights must not change now.
  virtual void check_before_load() {}

  // ---- the steps of a pass, in order; the caller holds mutex_ ----

  // Makes the plan. Throws as forward() does.
  void begin(const ForwardArgs& args) {
    if (!loaded_) throw_runtime("forward: layer ", config_.layer_idx, " has no weights, load them first");
    call_.kernels = &kernels::active_table();
    call_.config = &config_;
    call_.args = &args;
    call_.weights = config_.scale_inputs ? nullptr : args.topk_weights;
    call_.plan_batch();
  }

  // Makes the inputs, of a layer that scales them by the routing weights [T, P].
  void run_scale_inputs(const float* weights) {
    if (!config_.scale_inputs) return;
    constexpr uint32_t kTokens = 4;
    const uint32_t tokens = call_.args->num_tokens;
    run_tasks(static_cast<uint32_t>(div_up(tokens, kTokens)), [&](uint32_t, uint32_t task) {
      scale_inputs(call_.plan, call_.args->hidden_states, weights,
                   static_cast<size_t>(config_.num_experts_per_tok), call_.hidden(), task * kTokens,
                   std::min((task + 1) * kTokens, tokens), call_.scaled_x);
    });
  }
  size_t scaled_bytes() const {
    return config_.scale_inputs ? call_.plan.num_rows() * call_.hidden() * sizeof(bf16) : 0;
  }
  void place_scaled(std::byte* at) {
    call_.scaled_x = config_.scale_inputs ? reinterpret_cast<bf16*>(at) : nullptr;
  }

  void run_gate_up() {
    if (kernel_.is_integer && call_.plan.num_rows() != 0)
      quantize(call_.inputs(), call_.num_inputs(), static_cast<uint32_t>(config_.hidden_size), call_.x8);
    for_parts([&](Part& part, int i) { part.cut_gate_up(call_, config_.pool->num_threads(i)); });
    run_phase(&Part::num_gate_up, [&](const Worker& worker, Part& part, uint32_t task) {
      part.gate_up(call_, call_.workers[static_cast<size_t>(worker.index)], task);
    });
  }

  void run_down(uint32_t passes) {
    if (kernel_.is_integer)
      quantize({call_.h_rows, call_.h_stride(), nullptr}, call_.plan.num_rows(),
               static_cast<uint32_t>(config_.intermediate_size), call_.h8);
    for (uint32_t pass = 0; pass < passes; ++pass) {
      for_parts([&](Part& part, int i) { part.cut_down(call_, config_.pool->num_threads(i), pass, passes); });
      run_phase(&Part::num_down, [&](const Worker& worker, Part& part, uint32_t task) {
        part.down(call_, call_.workers[static_cast<size_t>(worker.index)], task);
      });
      run_combine();
    }
  }

  // Rows to int8, for the integer products behind it.
  void quantize(const kernels::RowsView& rows, uint32_t num, uint32_t k, const kernels::Int8Rows& to) {
    forget_packed();
    constexpr size_t kInline = 32 << 10;  // elements: waking the others would take longer
    constexpr uint32_t kRows = 16;
    const auto block = [&](uint32_t first, uint32_t count) {
      const kernels::RowsView some{rows.data + first * rows.stride, rows.stride, nullptr};
      call_.kernels->quantize_rows(some, count, k, to.from(first));
    };
    if (size_t{num} * k <= kInline) return block(0, num);
    config_.pool->run(static_cast<uint32_t>(div_up(num, kRows)), [&](const Worker&, int, uint32_t task) {
      block(task * kRows, std::min(kRows, num - task * kRows));
    });
  }

  void forget_packed() {
    for (WorkerScratch& worker : call_.workers) worker.packed = {};
  }

  void run_combine() {
    for (const SlotSum& sum : call_.sums()) {
      call_.sum = &sum;
      run_phase(&Part::num_combine,
                [&](const Worker&, Part& part, uint32_t task) { part.combine(call_, task); });
    }
  }

  // The rows of one block at most, of an operand of k inputs.
  uint32_t most_rows(uint32_t k) const {
    uint32_t most = 1;
    for (const auto& expert : call_.plan.active) most = std::max(most, expert.rows);
    return std::min(static_cast<uint32_t>(round_up(most, kernels::kOutputBlock)), most_rows_per_block(k));
  }

  // As many passes over the hidden size as keep the fp32 results of the down projection within a budget that
  // the last-level cache holds.
  uint32_t num_passes() const {
    constexpr size_t kBudgetBytes = size_t{32} << 20;
    const size_t bytes =
        size_t{call_.plan.num_rows()} * static_cast<size_t>(config_.hidden_size) * sizeof(float);
    const size_t most = div_up(static_cast<size_t>(config_.hidden_size), 8 * kernels::kOutputBlock);
    return static_cast<uint32_t>(
        std::clamp<size_t>(div_up(bytes, kBudgetBytes), 1, std::max<size_t>(most, 1)));
  }

  // Under this many bytes of weights and thousands of flop, waking the other workers takes longer than the
  // work.
  bool is_tiny() const {
    constexpr size_t kTiny = 256 << 10;
    const size_t matrix =
        3 * static_cast<size_t>(config_.intermediate_size) * static_cast<size_t>(config_.hidden_size);
    return (call_.plan.active.size() + call_.plan.num_rows() / 8) * matrix * sizeof(bf16) < kTiny;
  }

  // Where the rows lie that integer products take.
  struct Int8Scratch {
    size_t x = 0, h = 0;
    void take(const TP_MOE_Common& layer, ScratchPlan& plan) {
      x = plan.take(kernels::Int8Rows::bytes(layer.call_.num_inputs(), hidden(layer)));
      h = plan.take(kernels::Int8Rows::bytes(layer.call_.plan.num_rows(), width(layer)));
    }
    void place(TP_MOE_Common& layer, std::byte* base) const {
      LayerCall& call = layer.call_;
      call.x8 = kernels::Int8Rows::in(base + x, call.num_inputs(), hidden(layer));
      call.h8 = kernels::Int8Rows::in(base + h, call.plan.num_rows(), width(layer));
    }
    static uint32_t hidden(const TP_MOE_Common& layer) {
      return static_cast<uint32_t>(layer.config_.hidden_size);
    }
    static uint32_t width(const TP_MOE_Common& layer) {
      return static_cast<uint32_t>(layer.config_.intermediate_size);
    }
  };

  template <class Function>
  void for_parts(Function&& function) {
    for (size_t i = 0; i < parts_.size(); ++i) function(*parts_[i], static_cast<int>(i));
  }

  template <class Function>
  void run_phase(uint32_t (Part::*count)() const, Function&& task_of_part) {
    counts_.clear();
    for (const auto& part : parts_) counts_.push_back(((*part).*count)());
    const auto run_task = [&](const Worker& worker, int part, uint32_t task) {
      task_of_part(worker, *parts_[static_cast<size_t>(part)], task);
    };
    if (is_tiny()) {
      config_.pool->run_inline(counts_, run_task);
    } else {
      config_.pool->run(counts_, run_task);
    }
  }

  // Tasks that are no part's own, shared by all threads: function(worker, task).
  template <class Function>
  void run_tasks(uint32_t num_tasks, Function&& function) {
    const auto run_task = [&](const Worker& worker, int, uint32_t task) {
      function(static_cast<uint32_t>(worker.index), task);
    };
    if (is_tiny()) {
      counts_.assign(parts_.size(), 0);
      counts_[0] = num_tasks;
      config_.pool->run_inline(counts_, run_task);
    } else {
      config_.pool->run(num_tasks, run_task);
    }
  }

  GeneralMOEConfig config_;
  const GemmKernel kernel_;
  std::vector<std::unique_ptr<Part>> parts_;
  ExpertWeights weights_;
  std::vector<NodeMatrices> nodes_;  // of each part, when there are several nodes
  bool loaded_ = false;
  LayerCall call_;
  mutable std::mutex mutex_;  // a layer works on one call at a time, should two engines be given tasks of it

 private:
  // Where everything lies in the borrowed scratch.
  struct Scratch {
    ScratchPlan plan;
    std::vector<size_t> h, y;
    size_t h_rows = 0, scaled = 0;
    Int8Scratch int8;
    size_t workers = 0, per_worker = 0, operand = 0, c = 0;

    Scratch(const TP_MOE_Common& layer, uint32_t passes) {
      const auto& k = *layer.call_.kernels;
      const auto width = static_cast<uint32_t>(layer.config_.intermediate_size);
      const auto hidden = static_cast<uint32_t>(layer.config_.hidden_size);
      scaled = plan.take(layer.scaled_bytes());
      if (layer.kernel_.is_integer) {
        h_rows = plan.take(layer.call_.plan.num_rows() * layer.call_.h_stride() * sizeof(bf16));
        int8.take(layer, plan);
      } else {
        for (const auto& expert : layer.call_.plan.active)
          h.push_back(plan.take(k.operand_bytes(expert.rows, width)));
      }
      for (const auto& part : layer.parts_)
        y.push_back(
            plan.take(size_t{layer.call_.plan.num_rows()} * part->widest_pass(passes) * sizeof(float)));

      const uint32_t most = std::max(layer.most_rows(hidden), layer.most_rows(width));
      const auto operand_bytes = [&](uint32_t size) {
        return round_up(layer.kernel_.operand_bytes(k, layer.most_rows(size), size), kCacheLine);
      };
      operand = std::max(operand_bytes(hidden), layer.kernel_.is_integer ? operand_bytes(width) : 0);
      c = round_up(k.c_floats(most, kernels::kMaxPanelOutputs) * sizeof(float), kCacheLine);
      per_worker = operand + 2 * c + round_up(k.nt_scratch_bytes(std::max(width, hidden)), kCacheLine);
      workers = plan.take(per_worker * static_cast<size_t>(layer.config_.pool->num_threads()));
    }

    void place(TP_MOE_Common& layer, std::byte* base) const {
      LayerCall& call = layer.call_;
      layer.place_scaled(base + scaled);
      call.h.clear();
      for (size_t at : h) call.h.push_back(base + at);
      if (layer.kernel_.is_integer) {
        call.h_rows = reinterpret_cast<bf16*>(base + h_rows);
        int8.place(layer, base);
      }
      for (size_t i = 0; i < y.size(); ++i) layer.parts_[i]->set_y(reinterpret_cast<float*>(base + y[i]));
      call.workers.resize(static_cast<size_t>(layer.config_.pool->num_threads()));
      for (size_t i = 0; i < call.workers.size(); ++i) {
        std::byte* own = base + workers + i * per_worker;
        call.workers[i] = {static_cast<uint32_t>(i),
                           PackedRows{},
                           own,
                           reinterpret_cast<float*>(own + operand),
                           reinterpret_cast<float*>(own + operand + c),
                           own + operand + 2 * c};
      }
    }
  };

  // On one node the parts read the caller's memory. On several each gets its own rows, once, and the
  // caller's memory is let go: every byte is still held once.
  bool spans_nodes() const {
    const auto& nodes = config_.pool->config().subpool_numa_map;
    return std::any_of(nodes.begin(), nodes.end(), [&](int node) { return node != nodes.front(); });
  }

  std::vector<NodeMatrices> copy_to_nodes(const ExpertMatrices& matrices) const {
    std::vector<NodeMatrices> nodes;
    for (size_t i = 0; i < parts_.size(); ++i)
      nodes.push_back(copy_to_node(matrices, parts_[i]->share(), static_cast<int>(i), *config_.pool));
    return nodes;
  }

  static ProjectionFormats formats_of(const ExpertMatrices& m) {
    const FormatId gate = m.gate.front().format;
    return {gate, m.up.empty() ? gate : m.up.front().format, m.down.front().format};
  }

  ExpertRows rows_of(uint32_t expert) const {
    ExpertRows rows;
    const auto add = [&](const ExpertMatrices& m, const OutputShare& share) {
      rows.gate.push_back({share.intermediate, m.gate[expert]});
      if (!m.up.empty()) rows.up.push_back({share.intermediate, m.up[expert]});
      rows.down.push_back({share.hidden, m.down[expert]});
    };
    if (nodes_.empty()) {
      const Span width{0, static_cast<uint32_t>(config_.intermediate_size)};
      add(weights_.matrices, {width, {0, static_cast<uint32_t>(config_.hidden_size)}});
    }
    for (size_t i = 0; i < nodes_.size(); ++i) add(nodes_[i].matrices, parts_[i]->share());
    return rows;
  }

  void check(const ExpertWeights& w) const {
    const auto expect = [&](const char* name, size_t got, size_t wanted) {
      if (got != wanted) throw_invalid(name, ": got ", got, " values, expected ", wanted);
    };
    const auto num = static_cast<size_t>(config_.expert_num);
    const size_t width = num * static_cast<size_t>(config_.intermediate_size);
    expect("gate_proj", w.matrices.gate.size(), num);
    expect("up_proj", w.matrices.up.size(), config_.activation.gated ? num : 0);
    expect("down_proj", w.matrices.down.size(), num);
    if (!w.biases.gate.empty()) expect("gate_bias", w.biases.gate.size(), width);
    if (!w.biases.up.empty()) expect("up_bias", w.biases.up.size(), width);
    if (!w.biases.down.empty())
      expect("down_bias", w.biases.down.size(), num * static_cast<size_t>(config_.hidden_size));
  }

  std::vector<uint32_t> counts_;
  std::atomic<ProjectionFormats> formats_;  // of what is loaded
};

}  // namespace ktmoe
