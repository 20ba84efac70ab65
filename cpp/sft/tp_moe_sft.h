// A layer of experts that trains, over all sub-pools of an engine.
//
// forward     copy the input | ug, uu | gate, up, activation | ud | down, combine
// backward    r | z, dg, du | dug, duu | gradients of matrices | (dg, du to left operands) | dx, combine
#pragma once

#include <optional>
#include <utility>

#include "kernels/table.h"
#include "moe/layer/tp_moe_common-inl.h"
#include "sft/backward_inner.h"
#include "sft/backward_output.h"
#include "sft/backward_weights.h"
#include "sft/cache_stack.h"
#include "sft/sft_moe_tp.h"
#include "sft/training_scratch.h"

namespace ktmoe {

class TP_MOE_SFT : public TP_MOE_Common<AMX_SFT_MOE_TP, MoE_SFT_Interface> {
  using Part = AMX_SFT_MOE_TP;
  using Common = TP_MOE_Common<Part, MoE_SFT_Interface>;

 public:
  // Adapters begin as copies of what is given, and as zeros where nothing is.
  TP_MOE_SFT(MOESFTConfig config, GemmKernel kernel, const LoraSources& lora = {})
      : Common((config.validate(), config), kernel),
        sft_config_(std::move(config)),
        lora_(std::make_shared<LoraWeights>(sft_config_, lora)),
        caches_(std::make_shared<CacheStack>(static_cast<size_t>(sft_config_.max_cache_depth))) {}

  const MOESFTConfig& sft_config() const override { return sft_config_; }
  size_t num_cached() const override { return caches_->size(); }
  size_t cache_bytes() const override { return caches_->bytes(); }
  void clear_cache() override {
    locked([&] { caches_->clear(); });
  }
  uint32_t step() const override { return caches_->step(); }
  void set_step(uint32_t step) override { caches_->set_step(step); }
  std::shared_ptr<TrainingCall> new_call() override { return std::make_shared<TrainingCall>(caches_); }

  void update_lora_weights(const LoraSources& sources) override {
    locked([&] {
      // What waits for its backward pass keeps the values it was computed with.
      if (lora_.use_count() > 1) lora_ = std::make_shared<LoraWeights>(*lora_);
      lora_->update(sources, *config_.pool);
    });
  }

  void forget_forwards() override {
    locked([&] { caches_->forget(); });
  }

  bool is_last(uint32_t number, uint32_t num_tokens) override {
    bool is = false;
    locked([&] { is = caches_->is_last(number, num_tokens); });
    return is;
  }

  void forward_sft(const ForwardArgs& args, bool save, uint32_t number = 0,
                   TrainingCall* call = nullptr) override {
    locked([&] {
      if (caches_->is_revoked(call)) return;
      if (save && caches_->size() >= caches_->depth())
        throw_runtime("forward_sft: as many forwards of layer ", config_.layer_idx,
                      " wait for their backward as may, max_cache_depth ", caches_->depth(),
                      "; call backward or clear the cache first");
      begin(args);
      Filling filling(*caches_);
      ForwardCache& cache = filling.cache();
      fill_input(args, save, cache);
      {
        const RowsLease rows(*this, cache, save && !sft_config_.recompute, /*for_backward=*/false);
        run_forward(args, cache, /*to_the_end=*/true);
      }
      if (!save) return;
      cache.number = number;
      std::swap(cache.plan, call_.plan);
      filling.keep(call);
    });
  }

  void backward(const BackwardArgs& args, TrainingCall* call = nullptr) override {
    locked([&] {
      if (caches_->is_revoked(call)) return;
      Using use(*caches_, call);
      if (use.nothing())
        throw_runtime("backward: no forward of layer ", config_.layer_idx,
                      " waits for it, expected a forward_sft with save_for_backward first");
      ForwardCache& cache = use.cache();
      if (args.num_tokens != cache.num_tokens)
        throw_invalid("grad_output: got ", args.num_tokens, " tokens, expected ", cache.num_tokens,
                      " as in the forward pass");
      const PlanLoan loan(call_.plan, cache.plan);
      const RowsLease rows(*this, cache, !sft_config_.recompute, /*for_backward=*/true);
      ForwardArgs forward;
      forward.num_tokens = cache.num_tokens;
      if (sft_config_.recompute || cache.is_overwritten) run_forward(forward, cache, /*to_the_end=*/false);
      cache.is_overwritten = false;
      run_backward(args, cache);
      use.done();
    });
  }

 protected:
  void check_before_load() override {
    if (caches_->size() != 0)
      throw_runtime("load_weights: forwards of layer ", config_.layer_idx, " wait for their backward, got ",
                    caches_->size(), ", expected none");
    caches_->forget();  // what backward passes of other threads have just used up
  }

 private:
  template <class Function>
  void locked(Function&& function) const {
    const std::lock_guard lock(mutex_);
    function();
  }

  // A cache that is being filled: kept on the stack in the end, or its memory is spare again.
  class Filling {
   public:
    explicit Filling(CacheStack& stack) : stack_(stack), cache_(stack.take_spare()) {}
    ~Filling() {
      if (cache_) stack_.give_back(std::move(cache_));
    }
    Filling(const Filling&) = delete;
    Filling& operator=(const Filling&) = delete;
    ForwardCache& cache() { return *cache_; }
    void keep(TrainingCall* call) { stack_.push(std::move(cache_), call); }

   private:
    CacheStack& stack_;
    CacheStack::Cache cache_;
  };

  // The last cache, for a backward pass: gone when that is done, else back where it was.
  class Using {
   public:
    Using(CacheStack& stack, TrainingCall* call) : stack_(stack), call_(call), cache_(stack.take_last()) {}
    ~Using() {
      if (cache_) is_done_ ? stack_.use_up(std::move(cache_), call_) : stack_.put_back(std::move(cache_));
    }
    Using(const Using&) = delete;
    Using& operator=(const Using&) = delete;
    bool nothing() const { return cache_ == nullptr; }
    ForwardCache& cache() { return *cache_; }
    void done() { is_done_ = true; }

   private:
    CacheStack& stack_;
    TrainingCall* call_;
    CacheStack::Cache cache_;
    bool is_done_ = false;
  };

  // The plan of a cache, in use for the length of a scope.
  class PlanLoan {
   public:
    PlanLoan(RoutingPlan& user, RoutingPlan& owner) : user_(user), owner_(owner) { std::swap(user, owner); }
    ~PlanLoan() { std::swap(user_, owner_); }
    PlanLoan(const PlanLoan&) = delete;
    PlanLoan& operator=(const PlanLoan&) = delete;

   private:
    RoutingPlan &user_, &owner_;
  };

  // Memory for a cache's rows for the length of a scope, unless it has its own.
  class RowsLease {
   public:
    RowsLease(TP_MOE_SFT& layer, ForwardCache& cache, bool own, bool for_backward) {
      if (own) return;
      ScratchPlan plan;
      const RowsPlan rows(layer.sft_config_, layer.call_.plan.num_rows(), for_backward, plan);
      lease_.emplace(layer.config_.pool->scratch().lease(plan.bytes()));
      cache.rows = rows.place(lease_->data());
    }

   private:
    std::optional<ScratchPool::Lease> lease_;
  };

  // The parts are in training for the length of a scope.
  class Training {
   public:
    Training(TP_MOE_SFT& layer, TrainingPass& pass) : layer_(layer) {
      layer.for_parts([&](Part& part, int) { part.set_pass(&pass); });
    }
    ~Training() {
      layer_.for_parts([](Part& part, int) { part.set_pass(nullptr); });
    }
    Training(const Training&) = delete;
    Training& operator=(const Training&) = delete;

   private:
    TP_MOE_SFT& layer_;
  };

  TrainingPass make_pass(ForwardCache& cache) {
    TrainingPass pass;
    pass.config = &sft_config_;
    pass.kernel = kernel_;
    pass.call = &call_;
    pass.cache = &cache;
    pass.lora_scale = sft_config_.lora_scale(/*drops=*/cache.mask_x != nullptr);
    pass.biases = &weights_.biases;
    pass.logical = &weights_.logical;
    for (size_t i = 0; i < nodes_.size(); ++i) pass.segments.push_back({shares_[i], &nodes_[i].matrices});
    if (nodes_.empty()) pass.segments = {{{{0, pass.inter()}, {0, pass.hidden()}}, &weights_.matrices}};
    return pass;
  }

  // Takes the memory of a cache and copies into it what the layer computes from.
  void fill_input(const ForwardArgs& args, bool save, ForwardCache& cache) {
    const bool drops = save && sft_config_.lora_dropout > 0 && sft_config_.lora_rank > 0;
    const size_t rows = call_.plan.num_rows();
    ScratchPlan plan;
    const InputPlan input(sft_config_, args.num_tokens, rows, drops, plan);
    std::optional<RowsPlan> own_rows;
    if (save && !sft_config_.recompute) own_rows.emplace(sft_config_, rows, true, plan);
    cache.memory.reserve(plan.bytes());
    input.place(cache.memory.data(), cache);
    if (own_rows) cache.rows = own_rows->place(cache.memory.data());
    cache.num_tokens = args.num_tokens;
    cache.step = caches_->step();
    cache.lora = lora_;

    constexpr uint32_t kTokens = 16;
    run_tasks(static_cast<uint32_t>(div_up(args.num_tokens, kTokens)), [&](uint32_t, uint32_t task) {
      for (uint32_t t = task * kTokens; t < std::min((task + 1) * kTokens, args.num_tokens); ++t)
        fill_token(args, t, cache);
    });
  }

  void fill_token(const ForwardArgs& args, uint32_t t, ForwardCache& cache) const {
    const auto hidden = static_cast<uint32_t>(config_.hidden_size);
    const bf16* from = args.hidden_states + size_t{t} * hidden;
    bf16* to = cache.hidden + size_t{t} * hidden;
    const bool finite = std::all_of(from, from + hidden, is_finite);
    constexpr bf16 kNaN{0x7fc0};
    finite ? std::copy_n(from, hidden, to) : std::fill_n(to, hidden, kNaN);
    const auto slots = static_cast<size_t>(config_.num_experts_per_tok);
    for (size_t i = t * slots; i < (t + 1) * slots; ++i)
      if (call_.plan.row[i] >= 0)
        cache.row_weight[call_.plan.row[i]] = cache.input_weight ? 1.0f : args.topk_weights[i];
    if (cache.input_weight) std::copy_n(args.topk_weights + t * slots, slots, cache.input_weight + t * slots);
    if (cache.mask_x == nullptr) return;
    const auto inter = static_cast<uint32_t>(config_.intermediate_size);
    DropoutKey key{sft_config_.seed, cache.step, static_cast<uint32_t>(config_.layer_idx), 0,
                   sft_config_.lora_dropout};
    draw_mask(key, t, hidden, cache.mask_x + t * mask_row_bytes(hidden));
    key.which = 1;
    draw_mask(key, t, inter, cache.mask_h + t * mask_row_bytes(inter));
  }

  // The layer on the cache's input; without the end, only what the backward pass needs.
  void run_forward(const ForwardArgs& args, ForwardCache& cache, bool to_the_end) {
    ForwardArgs own = args;
    own.hidden_states = cache.hidden;
    call_.args = &own;
    TrainingPass pass = make_pass(cache);
    const uint32_t passes = to_the_end ? num_passes() : 0;
    ScratchPlan plan;
    const std::vector<size_t> y = take_y(plan, passes);
    const size_t threads = static_cast<size_t>(config_.pool->num_threads());
    const size_t scaled = plan.take(scaled_bytes());
    Int8Scratch int8;
    if (kernel_.is_integer) int8.take(*this, plan);
    const ForwardWorkersPlan workers(pass, most_rows(pass.hidden()), most_rows(pass.inter()), threads, plan);
    const ScratchPool::Lease lease = config_.pool->scratch().lease(plan.bytes());
    place_y(y, lease.data());
    place_scaled(lease.data() + scaled);
    workers.place(lease.data(), pass);
    if (kernel_.is_integer) int8.place(*this, lease.data());
    call_.h_rows = cache.rows.kept.h;
    const Training training(*this, pass);

    run_scale_inputs(cache.input_weight);
    run_inner(pass, pass.hidden(), first_inner);
    run_gate_up();
    run_inner(pass, pass.inter(), down_inner);
    if (to_the_end) run_down(passes);
  }

  using InnerStep = void (*)(TrainingPass&, WorkerScratch&, const PanelTask&);
  void run_inner(TrainingPass& pass, uint32_t k, InnerStep step) {
    forget_packed(pass);
    if (pass.rank() == 0) return;
    const std::vector<PanelTask> tasks = row_blocks(k);
    run_tasks(static_cast<uint32_t>(tasks.size()),
              [&](uint32_t worker, uint32_t task) { step(pass, call_.workers[worker], tasks[task]); });
  }

  // What workers have packed is of another matrix from here on.
  void forget_packed(TrainingPass& pass) {
    SharedLayer::forget_packed();
    for (ForwardScratch& worker : pass.forward) worker.inner[0] = worker.inner[1] = {};
  }

  void run_backward(const BackwardArgs& args, ForwardCache& cache) {
    ForwardArgs to_input;  // dx is combined as outputs are, with weights of one or those of the inputs
    to_input.num_tokens = args.num_tokens;
    to_input.hidden_states = cache.hidden;
    to_input.out = args.grad_input;
    call_.args = &to_input;
    call_.weights = cache.input_weight;
    call_.kernels = &kernels::active_table();
    TrainingPass pass = make_pass(cache);
    pass.args = &args;
    const uint32_t passes = num_passes();
    ScratchPlan plan;
    const std::vector<size_t> y = take_y(plan, passes);
    const size_t threads = static_cast<size_t>(config_.pool->num_threads());
    const uint32_t most =
        std::max({most_rows(pass.hidden()), most_rows(pass.inter()), most_rows(2 * pass.inter())});
    const BackwardPlan memory(pass, most, threads, plan);
    const size_t scaled = plan.take(scaled_bytes());
    const ScratchPool::Lease lease = config_.pool->scratch().lease(plan.bytes());
    place_y(y, lease.data());
    memory.place(lease.data(), pass);
    place_scaled(lease.data() + scaled);
    const Training training(*this, pass);

    run_scale_inputs(cache.input_weight);
    run_step(pass, pass.hidden(), backward_output);
    cache.is_overwritten = !sft_config_.cache_float32;  // dg and du take the place of g and u
    for_parts([&](Part& part, int i) { part.cut_activation(call_, config_.pool->num_threads(i)); });
    run_phase(&Part::num_backward, [&](const Worker& worker, Part& part, uint32_t task) {
      part.activation(static_cast<uint32_t>(worker.index), task);
    });
    if (pass.rank()) run_step(pass, pass.inter(), backward_inner);
    run_weight_gradients(pass, weight_gradients(pass));
    run_step(pass, 2 * pass.inter(), pack_first_gradients);
    run_input(passes);
    run_grad_weights(pass);
  }

  using BackwardStep = void (*)(TrainingPass&, BackwardScratch&, const PanelTask&);
  void run_step(TrainingPass& pass, uint32_t k, BackwardStep step) {
    const std::vector<PanelTask> tasks = row_blocks(k);
    run_tasks(static_cast<uint32_t>(tasks.size()),
              [&](uint32_t worker, uint32_t task) { step(pass, pass.backward[worker], tasks[task]); });
  }

  void run_weight_gradients(TrainingPass& pass, const std::vector<WeightGradient>& gradients) {
    const auto tasks = cut_weight_gradients(gradients, static_cast<uint32_t>(config_.expert_num));
    run_tasks(static_cast<uint32_t>(tasks.size()), [&](uint32_t worker, uint32_t task) {
      backward_weights(pass, gradients, pass.backward[worker], tasks[task]);
    });
  }

  void run_input(uint32_t passes) {
    for (uint32_t i = 0; i < passes; ++i) {
      for_parts([&](Part& part, int p) { part.cut_input(call_, config_.pool->num_threads(p), i, passes); });
      run_phase(&Part::num_backward, [&](const Worker& worker, Part& part, uint32_t task) {
        part.input(static_cast<uint32_t>(worker.index), task);
      });
      run_combine();
    }
  }

  // The gradient of a routing weight: the sum over the blocks of its row, in their order.
  void run_grad_weights(const TrainingPass& pass) {
    constexpr size_t kSlots = 512;
    const bool scaled = pass.rows.grad_input_weight != nullptr;
    const size_t num_slots = call_.plan.row.size();
    const size_t blocks = scaled ? pass.rows.input_blocks : pass.rows.blocks;
    const float* all = scaled ? pass.rows.grad_input_weight : pass.rows.grad_weight;
    run_tasks(static_cast<uint32_t>(div_up(num_slots, kSlots)), [&](uint32_t, uint32_t task) {
      for (size_t i = task * kSlots; i < std::min((task + 1) * kSlots, num_slots); ++i) {
        const int32_t row = call_.plan.row[i];
        const float* parts = all + static_cast<size_t>(std::max(row, 0)) * blocks;
        float sum = 0;
        for (size_t b = 0; row >= 0 && b < blocks; ++b) sum += parts[b];
        pass.args->grad_weights[i] = sum;
      }
    });
  }

  // The blocks of rows of all experts that have some, cut for operands of k inputs.
  std::vector<PanelTask> row_blocks(uint32_t k) const {
    std::vector<PanelTask> tasks;
    cut_panels(call_.plan, {0, 1}, k, config_.pool->num_threads(), tasks);
    return tasks;
  }

  const MOESFTConfig sft_config_;
  std::shared_ptr<LoraWeights> lora_;
  const std::shared_ptr<CacheStack> caches_;
};

}  // namespace ktmoe
