// The definitions of AMX_MOE_BASE: included once per part class, by the .cpp that instantiates it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "moe/layer/moe_base.h"

namespace ktmoe {
namespace detail {

inline const float* bias_of(const std::vector<float>& biases, size_t at) {
  return biases.empty() ? nullptr : biases.data() + at;
}

// Element `at` of an array of bf16 or float, const or not; null stays null.
template <class Pointer>
Pointer element(Pointer base, kernels::FloatType type, size_t at) {
  if (base == nullptr) return nullptr;
  const size_t bytes = at * (type == kernels::FloatType::kBf16 ? sizeof(bf16) : sizeof(float));
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const std::byte, std::byte>;
  return static_cast<Byte*>(base) + bytes;
}

}  // namespace detail

template <class Derived>
void AMX_MOE_BASE<Derived>::cut_gate_up(const LayerCall& call, int num_threads) {
  cut_blocks(call.plan, intermediate_, call.nt_block_k(static_cast<uint32_t>(config_.hidden_size)),
             num_threads, gate_up_tasks_, {}, adapters_of_blocks(call));
}

template <class Derived>
void AMX_MOE_BASE<Derived>::cut_down(const LayerCall& call, int num_threads, uint32_t sweep,
                                     uint32_t sweeps) {
  begin_sweep(call, num_threads, sweep, sweeps);
  cut_blocks(call.plan, sweep_.columns, call.nt_block_k(static_cast<uint32_t>(config_.intermediate_size)),
             num_threads, down_tasks_, {}, adapters_of_blocks(call));
}

template <class Derived>
void AMX_MOE_BASE<Derived>::begin_sweep(const LayerCall& call, int num_threads, uint32_t sweep,
                                        uint32_t sweeps) {
  const Span part = share_of(hidden_.size(), kernels::kOutputBlock, sweep, sweeps);
  sweep_.columns = {hidden_.begin + part.begin, hidden_.begin + part.end};
  cut_tokens(call.args->num_tokens, sweep_.columns, num_threads, combine_tasks_);
}

template <class Derived>
void AMX_MOE_BASE<Derived>::gate_up(LayerCall& call, WorkerScratch& scratch, uint32_t task_index) {
  const BlockTask& task = gate_up_tasks_[task_index];
  const auto& expert = call.plan.active[task.active];
  const size_t e = expert.expert, width = static_cast<size_t>(config_.intermediate_size);

  kernels::ActivateArgs act;
  act.activation = config_.activation;
  act.n0 = task.n0, act.n1 = task.n1;
  act.kept = derived().kept_rows(call, task, task.n0);
  act.h = intermediate(call, task, act.kept);

  const std::byte* next = first_row_of_next(call, gate_up_tasks_, task_index, matrices_->gate);
  product(call, scratch, hidden_operand(call, scratch, task, call.blocks.gate), call.blocks.gate,
          matrices_->gate[e], task, config_.activation.gated ? matrices_->up[e].row(task.n0) : next,
          scratch.c_gate);
  act.c_gate = scratch.c_gate;
  act.gate_bias = detail::bias_of(biases_->gate, e * width + task.n0);
  if (config_.activation.gated) {
    product(call, scratch, hidden_operand(call, scratch, task, call.blocks.up), call.blocks.up,
            matrices_->up[e], task, next, scratch.c_up);
    act.c_up = scratch.c_up;
    act.up_bias = detail::bias_of(biases_->up, e * width + task.n0);
  }
  derived().activate(call, scratch, task, act);
}

template <class Derived>
void AMX_MOE_BASE<Derived>::down(LayerCall& call, WorkerScratch& scratch, uint32_t task_index) {
  const BlockTask& task = down_tasks_[task_index];
  const size_t e = call.plan.active[task.active].expert;
  const kernels::Operand h = down_operand(call, scratch, task);
  const std::byte* next = first_row_of_next(call, down_tasks_, task_index, matrices_->down);

  kernels::StoreRowsArgs store;
  store.bias = detail::bias_of(biases_->down, e * static_cast<size_t>(config_.hidden_size) + task.n0);
  store.m = task.m1 - task.m0, store.n = task.n1 - task.n0;
  store.y_stride = sweep_.columns.size();
  store.y = sweep_.y + first_row(call, task) * store.y_stride + (task.n0 - sweep_.columns.begin);
  if (call.kernels->c_is_rows && store.bias == nullptr && !derived().has_adapter(task))
    return product(call, scratch, h, call.blocks.down, matrices_->down[e], task, next,
                   static_cast<float*>(store.y), store.y_stride);

  product(call, scratch, h, call.blocks.down, matrices_->down[e], task, next, scratch.c_gate);
  store.c = scratch.c_gate;
  derived().store(call, scratch, task, store);
}

template <class Derived>
void AMX_MOE_BASE<Derived>::combine(const LayerCall& call, uint32_t task_index) {
  const BlockTask& task = combine_tasks_[task_index];
  const ForwardArgs& args = *call.args;
  if (args.expert_rows) return copy_expert_rows(call, task);
  const size_t slots = static_cast<size_t>(config_.num_experts_per_tok),
               hidden = static_cast<size_t>(config_.hidden_size);
  const size_t at = task.m0 * hidden + task.n0;

  const SlotSum& sum = *call.sum;
  kernels::CombineArgs c;
  c.y = sweep_.y + (task.n0 - sweep_.columns.begin);
  c.y_stride = sweep_.columns.size();
  c.row = sum.row + task.m0 * slots;
  c.weights = call.weights ? call.weights + task.m0 * slots : nullptr;
  c.tokens = task.m1 - task.m0, c.slots = static_cast<uint32_t>(slots), c.columns = task.n1 - task.n0;
  c.hidden = args.hidden_states + task.m0 * hidden;
  c.hidden_size = static_cast<uint32_t>(hidden);
  c.base = detail::element(sum.base, sum.base_type, at), c.base_type = sum.base_type;
  c.out = detail::element(sum.out, sum.out_type, at), c.out_type = sum.out_type;
  c.out_stride = hidden;
  call.kernels->combine(c);
}

template <class Derived>
void AMX_MOE_BASE<Derived>::copy_expert_rows(const LayerCall& call, const BlockTask& task) const {
  const size_t slots = static_cast<size_t>(config_.num_experts_per_tok),
               hidden = static_cast<size_t>(config_.hidden_size);
  const float* y = sweep_.y + (task.n0 - sweep_.columns.begin);
  float* to = call.args->expert_rows + call.first_expert_row[task.m0] * hidden + task.n0;
  for (size_t slot = task.m0 * slots; slot < task.m1 * slots; ++slot) {
    const int32_t row = call.plan.row[slot];
    if (row < 0) continue;
    std::copy_n(y + static_cast<size_t>(row) * sweep_.columns.size(), task.n1 - task.n0, to);
    to += hidden;
  }
}

template <class Derived>
kernels::KeptRows AMX_MOE_BASE<Derived>::kept_rows(const LayerCall& call, const BlockTask& task,
                                                   uint32_t column) const {
  kernels::KeptRows rows;
  if (!call.keeps_h_rows(kernel_)) return rows;
  rows.stride = call.h_stride();
  rows.h = call.h_rows + first_row(call, task) * rows.stride + column;
  return rows;
}

template <class Derived>
kernels::Operand AMX_MOE_BASE<Derived>::blocks_operand(const LayerCall& call, WorkerScratch& scratch,
                                                       const BlockTask& task, const std::byte* rows,
                                                       const int32_t* index, uint32_t k, uint32_t block) {
  const size_t stride = kernels::BlockRowLayout(k, block).stride();
  const kernels::Operand operand{rows + (index ? 0 : first_row(call, task) * stride), stride, index,
                                 task.m1 - task.m0, k};
  return scratch.packed.pack_once(
      task, [&] { return call.kernels->pack_blocks(operand, block, scratch.operand); }, block);
}

template <class Derived>
kernels::Operand AMX_MOE_BASE<Derived>::hidden_operand(const LayerCall& call, WorkerScratch& scratch,
                                                       const BlockTask& task, uint32_t block) {
  const kernels::RowsView rows = call.inputs_from(first_row(call, task));
  const auto hidden = static_cast<uint32_t>(config_.hidden_size);
  if (block != 0) return blocks_operand(call, scratch, task, call.x_in(block), rows.index, hidden, block);
  if (!kernel_.is_integer)
    return scratch.packed.pack_once(*call.kernels, rows, task, hidden, scratch.operand);
  const kernels::Int8Rows x8 = rows.index ? call.x8 : call.x8.from(first_row(call, task));
  return scratch.packed.pack_once(*call.kernels, x8, rows.index, task, hidden, scratch.operand);
}

template <class Derived>
kernels::Operand AMX_MOE_BASE<Derived>::intermediate(const LayerCall& call, const BlockTask& task,
                                                     const kernels::KeptRows& kept) const {
  const auto width = static_cast<uint32_t>(config_.intermediate_size);
  if (kept.h) return {nullptr, 0, nullptr, task.m1 - task.m0, width};
  const uint32_t rows = call.plan.active[task.active].rows;
  return call.kernels->operand_block(call.h[task.active], rows, width, task.m0, task.m1);
}

template <class Derived>
kernels::Operand AMX_MOE_BASE<Derived>::down_operand(const LayerCall& call, WorkerScratch& scratch,
                                                     const BlockTask& task) {
  const auto width = static_cast<uint32_t>(config_.intermediate_size);
  if (call.blocks.down != 0)
    return blocks_operand(call, scratch, task, call.h_blocks, nullptr, width, call.blocks.down);
  if (kernel_.is_integer)
    return scratch.packed.pack_once(*call.kernels, call.h8.from(first_row(call, task)), nullptr, task, width,
                                    scratch.operand);
  const kernels::KeptRows kept = derived().kept_rows(call, task, 0);
  if (kept.h == nullptr) return intermediate(call, task, kept);
  return scratch.packed.pack_once(*call.kernels, {kept.h, kept.stride, nullptr}, task, width,
                                  scratch.operand);
}

template <class Derived>
const std::byte* AMX_MOE_BASE<Derived>::first_row_of_next(const LayerCall& call,
                                                          const std::vector<BlockTask>& tasks,
                                                          uint32_t task_index,
                                                          const std::vector<WeightView>& matrices) {
  if (task_index + 1 >= tasks.size()) return nullptr;
  const BlockTask& next = tasks[task_index + 1];
  return matrices[call.plan.active[next.active].expert].row(next.n0);
}

template <class Derived>
void AMX_MOE_BASE<Derived>::product(const LayerCall& call, const WorkerScratch& scratch,
                                    const kernels::Operand& x, uint32_t block, const WeightView& w,
                                    const BlockTask& task, const std::byte* next_rows, float* c,
                                    size_t c_stride) {
  kernels::NtArgs nt;
  nt.next_rows = next_rows;
  nt.x = x, nt.w = w;
  nt.n0 = task.n0, nt.n1 = task.n1;
  nt.c = c, nt.c_stride = c_stride, nt.scratch = scratch.nt;
  if (block != 0) return call.kernels->nt_int8_blocks[static_cast<size_t>(w.format)](nt);
  kernel_.multiply(*call.kernels, nt);
}

}  // namespace ktmoe
