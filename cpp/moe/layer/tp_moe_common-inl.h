// The definitions of TP_MOE_Common: included once per layer class, by the .cpp that instantiates it.
#pragma once

#include <mutex>
#include <utility>

#include "core/error.h"
#include "moe/layer/tp_moe_common.h"

namespace ktmoe {

template <class Part, class Interface>
TP_MOE_Common<Part, Interface>::TP_MOE_Common(GeneralMOEConfig config, GemmKernel kernel)
    : SharedLayer(std::move(config), kernel) {
  for (const OutputShare& share : shares_) parts_.push_back(std::make_unique<Part>(config_, kernel_, share));
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::load_weights(ExpertWeights& weights) {
  check_weights(weights);
  const std::lock_guard lock(mutex_);
  check_before_load();
  take_weights(weights);
  for (size_t i = 0; i < parts_.size(); ++i) parts_[i]->set_weights(&matrices_of(i), &weights_.biases);
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::forward(const ForwardArgs& args) {
  const std::lock_guard lock(mutex_);
  const PassScope pass(*this);
  begin_forward(args);
  if (args.num_tokens == 0) return;
  const uint32_t sweeps = num_sweeps();
  const InferenceScratch layout(*this, sweeps);
  const ScratchPool::Lease lease = config_.pool->scratch().lease(layout.plan.bytes());
  layout.place(*this, lease.data());
  place_y(layout.y, lease.data());
  run_scale_inputs(args.topk_weights);
  run_gate_up();
  run_down(sweeps);
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::write_expert(const ExpertSlices& slices) {
  const std::lock_guard lock(mutex_);
  if (formats() != slices.formats)
    throw_runtime("layer ", config_.layer_idx,
                  " was given weights of another format after the task was made");
  write_slices(config_, rows_of(slices.expert), slices, *config_.pool);
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::run_gate_up() {
  quantize_inputs();
  for_parts([&](Part& part, int i) { part.cut_gate_up(call_, config_.pool->num_threads(i)); });
  run_parts(Phase::kGateUp, &Part::num_gate_up, [&](const Worker& worker, Part& part, uint32_t task) {
    part.gate_up(call_, call_.workers[static_cast<size_t>(worker.index)], task);
  });
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::run_down(uint32_t sweeps) {
  quantize_intermediate();
  for (uint32_t sweep = 0; sweep < sweeps; ++sweep) {
    for_parts([&](Part& part, int i) { part.cut_down(call_, config_.pool->num_threads(i), sweep, sweeps); });
    run_parts(Phase::kDown, &Part::num_down, [&](const Worker& worker, Part& part, uint32_t task) {
      part.down(call_, call_.workers[static_cast<size_t>(worker.index)], task);
    });
    run_combine();
  }
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::run_combine() {
  if (call_.args->expert_rows) call_.number_expert_rows();
  for (const SlotSum& sum : call_.sums()) {
    call_.sum = &sum;
    run_parts(Phase::kCombine, &Part::num_combine,
              [&](const Worker&, Part& part, uint32_t task) { part.combine(call_, task); });
  }
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::place_y(const std::vector<size_t>& y, std::byte* base) {
  for (size_t i = 0; i < y.size(); ++i) parts_[i]->set_y(reinterpret_cast<float*>(base + y[i]));
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::for_parts(FunctionRef<void(Part&, int)> function) {
  for (size_t i = 0; i < parts_.size(); ++i) function(*parts_[i], static_cast<int>(i));
}

template <class Part, class Interface>
void TP_MOE_Common<Part, Interface>::run_parts(Phase phase, uint32_t (Part::*count)() const,
                                               FunctionRef<void(const Worker&, Part&, uint32_t)> task) {
  const PhaseScope scope(*this, phase);
  counts_.clear();
  for (const auto& part : parts_) counts_.push_back(((*part).*count)());
  run_counts([&](const Worker& worker, int part, uint32_t i) {
    task(worker, *parts_[static_cast<size_t>(part)], i);
  });
}

}  // namespace ktmoe
