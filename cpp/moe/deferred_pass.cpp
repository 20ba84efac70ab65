#include "moe/deferred_pass.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/error.h"
#include "kernels/table.h"
#include "moe/plan/routing_plan.h"

namespace ktmoe {

void DeferredOutput::check_shape(uint32_t num_tokens, int64_t hidden_size) const {
  if (num_tokens == num_tokens_ && hidden_size == hidden_size_) return;
  throw_invalid("hidden_states: got [", num_tokens, ", ", hidden_size, "], expected [", num_tokens_, ", ",
                hidden_size_, "] like the deferred output of layer ", layer_idx_);
}

void DeferredOutput::rethrow() const {
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void DeferredOutput::round_to(bf16* out) const {
  const size_t size = size_t{num_tokens_} * static_cast<size_t>(hidden_size_);
  kernels::active_table().elementwise.round(sums_, size, out);
}

void DeferredOutput::begin() {
  is_ready_.store(false);
  error_ = nullptr;
}

void DeferredOutput::finish() {
  is_ready_.store(true);
  is_ready_.notify_all();
}

void DeferredOutput::fail(std::exception_ptr error) {
  std::fill_n(sums_, size_t{num_tokens_} * static_cast<size_t>(hidden_size_),
              std::numeric_limits<float>::quiet_NaN());
  error_ = std::move(error);
  finish();
}

DeferredPass::DeferredPass(std::shared_ptr<MoE_Interface> layer, const DeferringBatch& batch,
                           std::shared_ptr<const DeferredOutput> received,
                           std::shared_ptr<DeferredOutput> output)
    : layer_(std::move(layer)),
      batch_(batch),
      received_(std::move(received)),
      output_(std::move(output)),
      chunks_(cut_tokens(batch.args.num_tokens, batch.chunk_size)) {
  if (received_ != nullptr) received_->check_shape(batch_.args.num_tokens, layer_->config().hidden_size);
}

void DeferredPass::check_ids() const {
  const GeneralMOEConfig& c = layer_->config();
  const auto slots = static_cast<uint32_t>(c.num_experts_per_tok);
  const auto experts = static_cast<uint32_t>(c.expert_num);
  std::visit([&](const auto* ids) { check_expert_ids(ids, batch_.args.num_tokens, slots, experts); },
             batch_.ids);
}

SlotSplit DeferredPass::make_split() const {
  const GeneralMOEConfig& c = layer_->config();
  SlotSplit split;
  split.ids = batch_.ids, split.weights = batch_.args.topk_weights;
  split.num_tokens = batch_.args.num_tokens, split.num_used = batch_.num_used_tokens;
  split.num_slots = static_cast<uint32_t>(c.num_experts_per_tok);
  split.num_experts = static_cast<uint32_t>(c.expert_num);
  split.num_deferred = batch_.num_deferred;
  split.immediate = batch_.immediate_ids, split.deferred = batch_.deferred_ids;
  return split;
}

void DeferredPass::split() {
  const std::lock_guard lock(mutex_);
  if (output_ != nullptr) output_->begin();
  do_step([&] {
    SlotSplit split = make_split();
    split.run();
    if (!split.is_joint) copy_inputs();
    state_.store(split.is_joint ? State::kJoint : State::kSeparate);
  });
}

void DeferredPass::copy_inputs() const {
  const GeneralMOEConfig& c = layer_->config();
  const ForwardArgs& args = batch_.args;
  const size_t tokens = args.num_tokens;
  if (batch_.copied_hidden_states != nullptr)
    std::copy_n(args.hidden_states, tokens * static_cast<size_t>(c.hidden_size), batch_.copied_hidden_states);
  if (batch_.copied_weights != nullptr)
    std::copy_n(args.topk_weights, tokens * static_cast<size_t>(c.num_experts_per_tok),
                batch_.copied_weights);
}

void DeferredPass::compute_immediate(size_t chunk) {
  const std::lock_guard lock(mutex_);
  if (!can_compute()) return;
  do_step([&] {
    ForwardArgs args = batch_.args;
    args.topk_ids = batch_.immediate_ids;
    if (received_ != nullptr) {
      received_->rethrow();
      args.base = received_->sums(), args.base_type = kernels::FloatType::kFloat32;
    }
    if (is_joint()) args.deferred_ids = batch_.deferred_ids, args.deferred_out = output_->sums();
    layer_->forward(rows_of(args, layer_->config(), chunks_[chunk]));
  });
  if (is_joint() && is_last(chunk)) output_->finish();
}

void DeferredPass::compute_deferred(size_t chunk) {
  const std::lock_guard lock(mutex_);
  if (!can_compute() || is_joint() || output_ == nullptr) return;
  do_step([&] {
    ForwardArgs args = batch_.args;
    if (batch_.copied_hidden_states != nullptr) args.hidden_states = batch_.copied_hidden_states;
    if (batch_.copied_weights != nullptr) args.topk_weights = batch_.copied_weights;
    args.topk_ids = batch_.deferred_ids;
    args.is_deferred_part = true;
    args.base = nullptr;
    args.out = output_->sums(), args.out_type = kernels::FloatType::kFloat32;
    layer_->forward(rows_of(args, layer_->config(), chunks_[chunk]));
  });
  if (is_last(chunk)) output_->finish();
}

bool DeferredPass::can_compute() const {
  if (state_.load() == State::kUnsplit)
    throw_runtime("deferred pass: got a part of it that was not split, expected its split first");
  return state_.load() != State::kFailed;
}

// A step that throws fails the round.
void DeferredPass::do_step(FunctionRef<void()> step) {
  try {
    step();
  } catch (...) {
    state_.store(State::kFailed);
    if (output_ != nullptr) output_->fail(std::current_exception());
    throw;
  }
}

}  // namespace ktmoe
