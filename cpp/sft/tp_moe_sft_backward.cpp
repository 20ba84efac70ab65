#include <algorithm>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "kernels/table.h"
#include "sft/backward_lora_hidden.h"
#include "sft/backward_input.h"
#include "sft/backward_output.h"
#include "sft/backward_weights.h"
#include "sft/tp_moe_sft.h"
#include "sft/training_scratch.h"

namespace ktmoe {
namespace {

// The last cache, for a backward pass: used up when that is done, else put back.
class CacheInUse {
 public:
  CacheInUse(CacheStack& stack, TrainingCall* call) : stack_(stack), call_(call), cache_(stack.take_last()) {}
  ~CacheInUse() {
    if (cache_) is_done_ ? stack_.use_up(std::move(cache_), call_) : stack_.put_back(std::move(cache_));
  }
  CacheInUse(const CacheInUse&) = delete;
  CacheInUse& operator=(const CacheInUse&) = delete;
  bool is_empty() const { return cache_ == nullptr; }
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

}  // namespace

void TP_MOE_SFT::backward(const BackwardArgs& args, TrainingCall* call) {
  const std::lock_guard lock(mutex_);
  if (caches_->is_revoked(call)) return;
  const PassScope scope(*this);
  CacheInUse use(*caches_, call);
  if (use.is_empty())
    throw_runtime("backward: got no saved forward pass of layer ", config_.layer_idx,
                  ", expected a forward_sft with save_for_backward first");
  ForwardCache& cache = use.cache();
  if (args.num_tokens != cache.num_tokens)
    throw_invalid("grad_output: got ", args.num_tokens, " tokens, expected ", cache.num_tokens,
                  " as in the forward pass");
  const PlanLoan loan(call_.plan, cache.plan);
  if (args.grad_expert_rows) call_.check_expert_rows(args.num_expert_rows);
  count_backward();
  std::optional<ScratchPool::Lease> rows;
  const auto rank = static_cast<uint32_t>(sft_config_.lora_rank);
  if (sft_config_.recompute) rows.emplace(lease_rows(cache, rank, /*for_backward=*/true));
  ForwardArgs forward;
  forward.num_tokens = cache.num_tokens;
  if (sft_config_.recompute || cache.is_overwritten) run_forward(forward, cache, /*to_the_end=*/false);
  cache.is_overwritten = false;
  run_backward(args, cache);
  use.done();
}

void TP_MOE_SFT::run_backward(const BackwardArgs& args, ForwardCache& cache) {
  ForwardArgs to_input;  // dx is combined like outputs, with weights of one or those that scale the inputs
  to_input.num_tokens = args.num_tokens;
  to_input.hidden_states = cache.hidden;
  to_input.out = args.grad_input;
  to_input.expert_rows = args.grad_expert_rows;
  call_.args = &to_input;
  call_.weights = cache.input_weight;
  call_.kernels = &kernels::active_table();
  TrainingPass pass = make_pass(cache);
  pass.args = &args;
  const uint32_t sweeps = num_sweeps();
  ScratchPlan plan;
  const std::vector<size_t> y = take_y(plan, sweeps);
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
  run_step(Phase::kBackwardOutput, pass, pass.hidden(), backward_output);
  cache.is_overwritten = !sft_config_.cache_float32;  // dg and du take the place of g and u
  run_activation();
  if (pass.rank()) run_step(Phase::kBackwardAdapters, pass, pass.inter(), backward_lora_hidden);
  run_weight_gradients(pass, weight_gradients(pass));
  run_step(Phase::kPackGradients, pass, 2 * pass.inter(), pack_gradients_of_gate_up);
  run_input(sweeps);
  run_grad_weights(pass);
}

void TP_MOE_SFT::run_step(Phase phase, TrainingPass& pass, uint32_t k, BackwardStep step) {
  const std::vector<BlockTask> tasks = row_blocks(k);
  run_tasks(phase, static_cast<uint32_t>(tasks.size()),
            [&](uint32_t worker, uint32_t task) { step(pass, pass.backward[worker], tasks[task]); });
}

void TP_MOE_SFT::run_activation() {
  for_parts([&](Part& part, int i) { part.cut_activation(call_, config_.pool->num_threads(i)); });
  const auto run = [&](const Worker& worker, Part& part, uint32_t task) {
    part.activation(static_cast<uint32_t>(worker.index), task);
  };
  run_parts(Phase::kBackwardActivation, &Part::num_backward, run);
}

void TP_MOE_SFT::run_weight_gradients(TrainingPass& pass, const std::vector<WeightGradient>& gradients) {
  const auto tasks = cut_weight_gradients(gradients, static_cast<uint32_t>(config_.expert_num));
  const auto run = [&](uint32_t worker, uint32_t task) {
    backward_weights(pass, gradients, pass.backward[worker], tasks[task]);
  };
  run_tasks(Phase::kWeightGradients, static_cast<uint32_t>(tasks.size()), run);
}

void TP_MOE_SFT::run_input(uint32_t sweeps) {
  for (uint32_t i = 0; i < sweeps; ++i) {
    for_parts([&](Part& part, int p) { part.cut_input(call_, config_.pool->num_threads(p), i, sweeps); });
    const auto run = [&](const Worker& worker, Part& part, uint32_t task) {
      part.input(static_cast<uint32_t>(worker.index), task);
    };
    run_parts(Phase::kBackwardInput, &Part::num_backward, run);
    run_combine();
  }
}

void TP_MOE_SFT::run_grad_weights(const TrainingPass& pass) {
  constexpr size_t kSlots = 512;
  const bool scaled = pass.rows.grad_input_weight != nullptr;
  const size_t num_slots = call_.plan.row.size();
  const size_t blocks = scaled ? pass.rows.input_blocks : pass.rows.blocks;
  const float* all = scaled ? pass.rows.grad_input_weight : pass.rows.grad_weight;
  const auto num_tasks = static_cast<uint32_t>(div_up(num_slots, kSlots));
  run_tasks(Phase::kRoutingGradients, num_tasks, [&](uint32_t, uint32_t task) {
    for (size_t i = task * kSlots; i < std::min((task + 1) * kSlots, num_slots); ++i) {
      const int32_t row = call_.plan.row[i];
      const float* parts = all + static_cast<size_t>(std::max(row, 0)) * blocks;
      pass.args->grad_weights[i] = row < 0 ? 0.0f : pass.kernels().elementwise.sum(parts, blocks);
    }
  });
}

}  // namespace ktmoe
