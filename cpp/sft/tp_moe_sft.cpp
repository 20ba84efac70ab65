#include "sft/tp_moe_sft.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "moe/layer/tp_moe_common-inl.h"
#include "sft/forward_adapters.h"
#include "sft/training_scratch.h"

namespace ktmoe {

template class TP_MOE_Common<AMX_SFT_MOE_TP, MoE_SFT_Interface>;

namespace {

// A cache that is being filled: pushed on the stack in the end, or given back.
class NewCache {
 public:
  explicit NewCache(CacheStack& stack) : stack_(stack), cache_(stack.take_spare()) {}
  ~NewCache() {
    if (cache_) stack_.give_back(std::move(cache_));
  }
  NewCache(const NewCache&) = delete;
  NewCache& operator=(const NewCache&) = delete;
  ForwardCache& cache() { return *cache_; }
  void keep(TrainingCall* call) { stack_.push(std::move(cache_), call); }

 private:
  CacheStack& stack_;
  CacheStack::Cache cache_;
};

}  // namespace

TP_MOE_SFT::TP_MOE_SFT(MOESFTConfig config, GemmKernel kernel, const LoraSources& lora)
    : Common((config.validate(), config), kernel),
      sft_config_(std::move(config)),
      lora_(std::make_shared<LoraWeights>(sft_config_, lora)),
      caches_(std::make_shared<CacheStack>(static_cast<size_t>(sft_config_.max_cache_depth))) {}

void TP_MOE_SFT::clear_cache() {
  const std::lock_guard lock(mutex_);
  caches_->clear();
}

void TP_MOE_SFT::update_lora_weights(const LoraSources& sources) {
  const std::lock_guard lock(mutex_);
  // Saved forward passes keep the values that they were computed with.
  if (lora_.use_count() > 1) lora_ = std::make_shared<LoraWeights>(*lora_);
  lora_->update(sources, *config_.pool);
}

void TP_MOE_SFT::forget_forwards() {
  const std::lock_guard lock(mutex_);
  caches_->drop_waiting();
}

bool TP_MOE_SFT::is_last(uint32_t caller_id, uint32_t num_tokens) {
  const std::lock_guard lock(mutex_);
  return caches_->is_last(caller_id, num_tokens);
}

void TP_MOE_SFT::forward_sft(const ForwardArgs& args, bool save, uint32_t caller_id, TrainingCall* call) {
  const std::lock_guard lock(mutex_);
  if (caches_->is_revoked(call)) return;
  const PassScope scope(*this);
  if (save && caches_->size() >= caches_->depth())
    throw_runtime("forward_sft: got ", caches_->size(), " saved forward passes of layer ", config_.layer_idx,
                  ", expected fewer than max_cache_depth ", caches_->depth(),
                  "; call backward or clear the cache first");
  begin_forward(args);
  NewCache new_cache(*caches_);
  ForwardCache& cache = new_cache.cache();
  fill_input(args, save, cache);
  {
    std::optional<ScratchPool::Lease> rows;
    if (!save || sft_config_.recompute)
      rows.emplace(lease_rows(cache, most_rank(args), /*for_backward=*/false));
    run_forward(args, cache, /*to_the_end=*/true);
  }
  if (!save) return;
  cache.caller_id = caller_id;
  std::swap(cache.plan, call_.plan);
  new_cache.keep(call);
}

void TP_MOE_SFT::forward(const ForwardArgs& args) {
  if (args.adapters == nullptr) return Common::forward(args);
  const std::lock_guard lock(mutex_);
  const PassScope scope(*this);
  begin_forward(args);
  if (args.num_tokens == 0) return;
  NewCache new_cache(*caches_);
  ForwardCache& cache = new_cache.cache();
  fill_input(args, /*save=*/false, cache);
  const ScratchPool::Lease rows = lease_rows(cache, most_rank(args), /*for_backward=*/false);
  run_forward(args, cache, /*to_the_end=*/true);
}

void TP_MOE_SFT::set_adapter(uint32_t number, const LoraSources& sources, const MOESFTConfig& config) {
  const int64_t most =
      INT32_MAX / sft_config_.expert_num - 2;  // a plan numbers pairs of experts and adapters
  if (number > most) throw_invalid("number: got ", number, ", expected at most ", most);
  auto weights = std::make_unique<LoraWeights>(config);
  weights->update(sources, *config_.pool);
  const std::lock_guard lock(mutex_);
  const size_t size = std::max<size_t>(named_.size(), size_t{number} + 1);
  named_weights_.resize(size), named_.resize(size), call_.adapter_exists.resize(size);
  named_[number] = {weights.get(), static_cast<uint32_t>(config.lora_rank),
                    config.lora_scale(/*drops=*/false)};
  named_weights_[number] = std::move(weights);
  call_.adapter_exists[number] = 1;
}

void TP_MOE_SFT::remove_adapter(uint32_t number) {
  const std::lock_guard lock(mutex_);
  if (number >= named_.size()) return;
  call_.adapter_exists[number] = 0;
  named_[number] = {};
  named_weights_[number].reset();
}

void TP_MOE_SFT::check_before_load() {
  if (caches_->size() != 0)
    throw_runtime("load_weights: got ", caches_->size(), " forward passes of layer ", config_.layer_idx,
                  " that wait for their backward pass, expected none");
  caches_->drop_waiting();  // so that no revoked call restores a pass of the old weights
}

// ---- what both passes use ----

TP_MOE_SFT::Training::Training(TP_MOE_SFT& layer, TrainingPass& pass) : layer_(layer) {
  layer.for_parts([&](Part& part, int) { part.set_pass(&pass); });
}

TP_MOE_SFT::Training::~Training() {
  layer_.for_parts([](Part& part, int) { part.set_pass(nullptr); });
}

TrainingPass TP_MOE_SFT::make_pass(ForwardCache& cache) {
  TrainingPass pass;
  pass.config = &sft_config_;
  pass.kernel = kernel_;
  pass.call = &call_;
  pass.cache = &cache;
  pass.lora_scale = sft_config_.lora_scale(/*drops=*/cache.mask_x != nullptr);
  pass.most_rank = most_rank(*call_.args);
  if (call_.args->adapters != nullptr) pass.named = &named_;
  pass.biases = &weights_.biases;
  pass.logical = &weights_.logical;
  for (size_t i = 0; i < nodes_.size(); ++i) pass.segments.push_back({shares_[i], &nodes_[i].matrices});
  if (nodes_.empty()) pass.segments = {{{{0, pass.inter()}, {0, pass.hidden()}}, &weights_.matrices}};
  return pass;
}

uint32_t TP_MOE_SFT::most_rank(const ForwardArgs& args) const {
  if (args.adapters == nullptr) return static_cast<uint32_t>(sft_config_.lora_rank);
  uint32_t most = 0;
  for (const auto& rows : call_.plan.adapted)
    if (rows.adapter >= 0) most = std::max(most, named_[static_cast<size_t>(rows.adapter)].rank);
  return most;
}

ScratchPool::Lease TP_MOE_SFT::lease_rows(ForwardCache& cache, uint32_t rank, bool for_backward) {
  ScratchPlan plan;
  const RowsPlan rows(sft_config_, call_.plan.num_rows(), rank, for_backward, plan);
  ScratchPool::Lease lease = config_.pool->scratch().lease(plan.bytes());
  cache.rows = rows.place(lease.data());
  return lease;
}

std::vector<BlockTask> TP_MOE_SFT::row_blocks(uint32_t k) const {
  std::vector<BlockTask> tasks;
  cut_blocks(call_.plan, {0, 1}, k, config_.pool->num_threads(), tasks, {}, BlockAdapters::kOne);
  return tasks;
}

// ---- forward ----

void TP_MOE_SFT::fill_input(const ForwardArgs& args, bool save, ForwardCache& cache) {
  const bool drops = save && sft_config_.lora_dropout > 0 && sft_config_.lora_rank > 0;
  const size_t rows = call_.plan.num_rows();
  ScratchPlan plan;
  const InputPlan input(sft_config_, args.num_tokens, rows, drops, plan);
  std::optional<RowsPlan> own_rows;
  if (save && !sft_config_.recompute) own_rows.emplace(sft_config_, rows, most_rank(args), true, plan);
  cache.memory.reserve(plan.bytes());
  input.place(cache.memory.data(), cache);
  if (own_rows) cache.rows = own_rows->place(cache.memory.data());
  cache.num_tokens = args.num_tokens;
  cache.activation_dtype = args.activation_dtype;
  cache.step = caches_->step();
  cache.lora = lora_;

  constexpr uint32_t kTokens = 16;
  const auto num_tasks = static_cast<uint32_t>(div_up(args.num_tokens, kTokens));
  run_tasks(Phase::kSaveInputs, num_tasks, [&](uint32_t, uint32_t task) {
    for (uint32_t t = task * kTokens; t < std::min((task + 1) * kTokens, args.num_tokens); ++t)
      fill_token(args, t, cache);
  });
}

void TP_MOE_SFT::fill_token(const ForwardArgs& args, uint32_t t, ForwardCache& cache) const {
  const uint32_t hidden = hidden_size(), inter = intermediate_size();
  const bf16* from = args.hidden_states + size_t{t} * hidden;
  bf16* to = cache.hidden + size_t{t} * hidden;
  const kernels::ElementwiseKernels& elementwise = call_.kernels->elementwise;
  elementwise.copy_finite(from, hidden, to);
  const auto slots = static_cast<size_t>(config_.num_experts_per_tok);
  for (size_t i = t * slots; i < (t + 1) * slots; ++i)
    if (call_.plan.row[i] >= 0)
      cache.row_weight[call_.plan.row[i]] = cache.input_weight ? 1.0f : args.topk_weights[i];
  if (cache.input_weight) std::copy_n(args.topk_weights + t * slots, slots, cache.input_weight + t * slots);
  if (cache.mask_x == nullptr) return;
  DropoutKey key{sft_config_.seed, cache.step, static_cast<uint32_t>(config_.layer_idx), 0,
                 sft_config_.lora_dropout};
  elementwise.draw_mask(key, t, hidden, cache.mask_x + t * mask_row_bytes(hidden));
  key.which = 1;
  elementwise.draw_mask(key, t, inter, cache.mask_h + t * mask_row_bytes(inter));
}

void TP_MOE_SFT::run_forward(const ForwardArgs& args, ForwardCache& cache, bool to_the_end) {
  ForwardArgs own = args;
  own.hidden_states = cache.hidden;
  call_.args = &own;
  TrainingPass pass = make_pass(cache);
  const uint32_t sweeps = to_the_end ? num_sweeps() : 0;
  ScratchPlan plan;
  const std::vector<size_t> y = take_y(plan, sweeps);
  const size_t threads = static_cast<size_t>(config_.pool->num_threads());
  const size_t scaled = plan.take(scaled_bytes());
  choose_products(cache.activation_dtype);
  QuantizedScratch quantized;
  quantized.take(*this, plan);
  const ForwardWorkersPlan workers(pass, most_rows(call_.nt_block_k(pass.hidden())),
                                   most_rows(call_.nt_block_k(pass.inter())), threads, plan);
  const ScratchPool::Lease lease = config_.pool->scratch().lease(plan.bytes());
  place_y(y, lease.data());
  place_scaled(lease.data() + scaled);
  workers.place(lease.data(), pass);
  quantized.place(*this, lease.data());
  call_.h_rows = cache.rows.kept.h;
  const Training training(*this, pass);

  run_scale_inputs(cache.input_weight);
  run_lora_hidden(pass, pass.hidden(), gate_up_lora_hidden);
  run_gate_up();
  run_lora_hidden(pass, pass.inter(), down_lora_hidden);
  if (to_the_end) run_down(sweeps);
}

void TP_MOE_SFT::run_lora_hidden(TrainingPass& pass, uint32_t k, LoraHiddenStep step) {
  invalidate_packed(pass);
  if (pass.most_rank == 0) return;
  const std::vector<BlockTask> tasks = row_blocks(k);
  run_tasks(Phase::kAdapters, static_cast<uint32_t>(tasks.size()),
            [&](uint32_t worker, uint32_t task) { step(pass, call_.workers[worker], tasks[task]); });
}

void TP_MOE_SFT::invalidate_packed(TrainingPass& pass) {
  SharedLayer::invalidate_packed();
  for (ForwardScratch& worker : pass.forward) worker.lora_hidden[0] = worker.lora_hidden[1] = {};
}

}  // namespace ktmoe
