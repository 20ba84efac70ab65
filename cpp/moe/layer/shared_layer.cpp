#include "moe/layer/shared_layer.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "kernels/table.h"
#include "moe/layer/scaled_inputs.h"

namespace ktmoe {
namespace {

ProjectionFormats formats_of(const ExpertMatrices& m) {
  const FormatId gate = m.gate.front().format;
  return {gate, m.up.empty() ? gate : m.up.front().format, m.down.front().format};
}

}  // namespace

SharedLayer::SharedLayer(GeneralMOEConfig config, GemmKernel kernel)
    : config_(std::move(config)), kernel_(kernel) {
  config_.validate();
  check_products(config_.activation_dtype);
  const auto parts = static_cast<uint32_t>(config_.pool->num_subpools());
  for (uint32_t i = 0; i < parts; ++i) {
    const auto share = [&](uint32_t total) { return share_of(total, kernels::kOutputBlock, i, parts); };
    shares_.push_back({share(intermediate_size()), share(hidden_size())});
  }
}

// ---- weights ----

void SharedLayer::check_weights(const ExpertWeights& w) const {
  const auto expect = [&](const char* name, size_t got, size_t wanted) {
    if (got != wanted) throw_invalid(name, ": got ", got, " values, expected ", wanted);
  };
  const auto experts = static_cast<size_t>(config_.expert_num);
  expect("gate_proj", w.matrices.gate.size(), experts);
  expect("up_proj", w.matrices.up.size(), config_.activation.gated ? experts : 0);
  expect("down_proj", w.matrices.down.size(), experts);
  activation_blocks(kernel_, formats_of(w.matrices), config_.activation_dtype);
  if (!w.biases.gate.empty()) expect("gate_bias", w.biases.gate.size(), experts * intermediate_size());
  if (!w.biases.up.empty()) expect("up_bias", w.biases.up.size(), experts * intermediate_size());
  if (!w.biases.down.empty()) expect("down_bias", w.biases.down.size(), experts * hidden_size());
}

void SharedLayer::take_weights(ExpertWeights& weights) {
  const ProjectionFormats formats = formats_of(weights.matrices);
  if (spans_nodes()) {
    std::vector<NodeMatrices> nodes;
    for (size_t i = 0; i < shares_.size(); ++i)
      nodes.push_back(copy_to_node(weights.matrices, shares_[i], static_cast<int>(i), *config_.pool));
    nodes_ = std::move(nodes);
    std::swap(weights.biases, weights_.biases);
    std::swap(weights.logical, weights_.logical);
  } else {
    std::swap(weights, weights_);
  }
  formats_ = formats;
  loaded_ = true;
}

bool SharedLayer::spans_nodes() const {
  const auto& nodes = config_.pool->config().subpool_numa_map;
  return std::any_of(nodes.begin(), nodes.end(), [&](int node) { return node != nodes.front(); });
}

ProjectionFormats SharedLayer::loaded_formats() const {
  if (!loaded_) throw_runtime("layer ", config_.layer_idx, " has no weights, load them first");
  return formats_;
}

void SharedLayer::check_products(ActivationDtype dtype) const {
  if (loaded_) {
    activation_blocks(kernel_, formats_, dtype);
  } else if (const auto format = kernel_.format) {
    activation_blocks(kernel_, {*format, *format, *format}, dtype);
  }
}

ExpertRows SharedLayer::rows_of(uint32_t expert) const {
  ExpertRows rows;
  const auto add = [&](const ExpertMatrices& m, const OutputShare& share) {
    rows.gate.push_back({share.intermediate, m.gate[expert]});
    if (!m.up.empty()) rows.up.push_back({share.intermediate, m.up[expert]});
    rows.down.push_back({share.hidden, m.down[expert]});
  };
  if (nodes_.empty()) add(weights_.matrices, {{0, intermediate_size()}, {0, hidden_size()}});
  for (size_t i = 0; i < nodes_.size(); ++i) add(nodes_[i].matrices, shares_[i]);
  return rows;
}

// ---- steps ----

void SharedLayer::begin_forward(const ForwardArgs& args) {
  if (!loaded_) throw_runtime("forward: layer ", config_.layer_idx, " has no weights, load them first");
  call_.kernels = &kernels::active_table();
  call_.config = &config_;
  call_.args = &args;
  call_.weights = config_.scale_inputs ? nullptr : args.topk_weights;
  choose_products(args.activation_dtype);
  {
    const PhaseScope scope(*this, Phase::kRoute);
    call_.plan.counts_slots = stats_.has_value();
    call_.plan_batch();
  }
  if (args.expert_rows) call_.check_expert_rows(args.num_expert_rows);
  if (stats_) count_forward(args);
}

void SharedLayer::count_forward(const ForwardArgs& args) {
  stats_->forward_calls += !args.is_later_chunk && !args.is_deferred_part;
  if (!args.is_deferred_part) stats_->tokens += args.num_tokens;
  stats_->rows += call_.plan.num_rows();
  stats_->expert_readings += call_.plan.active.size();
  for (size_t e = 0; e < stats_->expert_tokens.size(); ++e)
    stats_->expert_tokens[e] += call_.plan.expert_slots[e];
}

void SharedLayer::count_backward() {
  if (!stats_) return;
  ++stats_->backward_calls;
  stats_->expert_readings += call_.plan.active.size();
}

void SharedLayer::choose_products(ActivationDtype dtype) {
  if (dtype == ActivationDtype::kDefault) dtype = config_.activation_dtype;
  call_.blocks = activation_blocks(kernel_, formats_, dtype);
}

void SharedLayer::run_scale_inputs(const float* weights) {
  if (!config_.scale_inputs) return;
  constexpr uint32_t kTokens = 4;
  const uint32_t tokens = call_.args->num_tokens;
  const auto num_tasks = static_cast<uint32_t>(div_up(tokens, kTokens));
  run_tasks(Phase::kScaleInputs, num_tasks, [&](uint32_t, uint32_t task) {
    scale_inputs(*call_.kernels, call_.plan, call_.args->hidden_states, weights,
                 static_cast<size_t>(config_.num_experts_per_tok), call_.hidden(), task * kTokens,
                 std::min((task + 1) * kTokens, tokens), call_.scaled_x);
  });
}

size_t SharedLayer::scaled_bytes() const {
  return config_.scale_inputs ? call_.plan.num_rows() * call_.hidden() * sizeof(bf16) : 0;
}

void SharedLayer::place_scaled(std::byte* at) {
  call_.scaled_x = config_.scale_inputs ? reinterpret_cast<bf16*>(at) : nullptr;
}

void SharedLayer::quantize_inputs() {
  if (call_.plan.num_rows() == 0) return;
  const kernels::RowsView x = call_.inputs();
  const uint32_t num_rows = call_.num_inputs(), k = hidden_size();
  if (kernel_.is_integer) quantize_rows(x, num_rows, k, call_.x8);
  for (uint32_t block : {128u, 256u})
    if (call_.blocks.takes(block)) quantize_blocks(x, num_rows, k, block, call_.x_in(block));
}

void SharedLayer::quantize_intermediate() {
  const kernels::RowsView h{call_.h_rows, call_.h_stride(), nullptr};
  const uint32_t num_rows = call_.plan.num_rows(), k = intermediate_size(), block = call_.blocks.down;
  if (kernel_.is_integer) quantize_rows(h, num_rows, k, call_.h8);
  if (block != 0) quantize_blocks(h, num_rows, k, block, call_.h_blocks);
}

void SharedLayer::quantize_rows(const kernels::RowsView& rows, uint32_t num_rows, uint32_t k,
                                const kernels::Int8Rows& to) {
  invalidate_packed();
  run_rows(num_rows, k, [&](uint32_t first, uint32_t count) {
    call_.kernels->quantize_rows({rows.data + first * rows.stride, rows.stride, nullptr}, count, k,
                                 to.from(first));
  });
}

void SharedLayer::quantize_blocks(const kernels::RowsView& rows, uint32_t num_rows, uint32_t k,
                                  uint32_t block, std::byte* to) {
  invalidate_packed();
  const size_t stride = kernels::BlockRowLayout(k, block).stride();
  run_rows(num_rows, k, [&](uint32_t first, uint32_t count) {
    call_.kernels->quantize_blocks({rows.data + first * rows.stride, rows.stride, nullptr}, count, k, block,
                                   to + first * stride);
  });
}

void SharedLayer::run_rows(uint32_t num_rows, uint32_t k, FunctionRef<void(uint32_t, uint32_t)> function) {
  constexpr size_t kInline = 32 << 10;  // elements: waking the others would take longer
  constexpr uint32_t kRows = 16;
  const PhaseScope scope(*this, Phase::kQuantize);
  if (size_t{num_rows} * k <= kInline) return function(0, num_rows);
  const auto run_task = [&](const Worker&, int, uint32_t task) {
    function(task * kRows, std::min(kRows, num_rows - task * kRows));
  };
  traced(run_task,
         [&](TaskFn task) { config_.pool->run(static_cast<uint32_t>(div_up(num_rows, kRows)), task); });
}

void SharedLayer::invalidate_packed() {
  for (WorkerScratch& worker : call_.workers) worker.packed = {};
}

uint32_t SharedLayer::most_rows(uint32_t k) const {
  uint32_t most = 1;
  for (const auto& expert : call_.plan.active) most = std::max(most, expert.rows);
  return std::min(static_cast<uint32_t>(round_up(most, kernels::kOutputBlock)), most_rows_per_block(k));
}

uint32_t SharedLayer::num_sweeps() const {
  constexpr size_t kBudgetBytes = size_t{32} << 20;
  const size_t bytes = size_t{call_.plan.num_rows()} * hidden_size() * sizeof(float);
  const size_t most = div_up(hidden_size(), 8 * kernels::kOutputBlock);
  return static_cast<uint32_t>(std::clamp<size_t>(div_up(bytes, kBudgetBytes), 1, std::max<size_t>(most, 1)));
}

// In bytes of weights, to which thousands of flop are added as if they were bytes.
bool SharedLayer::is_tiny() const {
  constexpr size_t kTiny = 256 << 10;
  const size_t matrix = size_t{3} * intermediate_size() * hidden_size();
  return (call_.plan.active.size() + call_.plan.num_rows() / 8) * matrix * sizeof(bf16) < kTiny;
}

std::vector<size_t> SharedLayer::take_y(ScratchPlan& plan, uint32_t sweeps) const {
  std::vector<size_t> y;
  for (const OutputShare& share : shares_) {
    const size_t width = widest_share(share.hidden.size(), kernels::kOutputBlock, sweeps);
    y.push_back(sweeps == 0 ? 0 : plan.take(call_.plan.num_rows() * width * sizeof(float)));
  }
  return y;
}

void SharedLayer::run_counts(TaskFn task) {
  traced(task, [&](TaskFn recorded) {
    if (is_tiny()) {
      config_.pool->run_inline(counts_, recorded);
    } else {
      config_.pool->run(counts_, recorded);
    }
  });
}

void SharedLayer::run_tasks(Phase phase, uint32_t num_tasks, FunctionRef<void(uint32_t, uint32_t)> function) {
  const PhaseScope scope(*this, phase);
  const auto run_task = [&](const Worker& worker, int, uint32_t task) {
    function(static_cast<uint32_t>(worker.index), task);
  };
  traced(run_task, [&](TaskFn recorded) {
    if (is_tiny()) {
      counts_.assign(shares_.size(), 0);
      counts_[0] = num_tasks;
      config_.pool->run_inline(counts_, recorded);
    } else {
      config_.pool->run(num_tasks, recorded);
    }
  });
}

void SharedLayer::traced(TaskFn task, FunctionRef<void(TaskFn)> run) {
  TaskTrace* const trace = config_.pool->trace();
  if (trace == nullptr) return run(task);
  TaskTrace::Span span;
  span.name = kPhaseNames[static_cast<size_t>(phase_)], span.layer = config_.layer_idx;
  const auto recorded = [&, span](const Worker& worker, int subpool, uint32_t number) {
    TaskTrace::Span own = span;
    own.worker = static_cast<uint32_t>(worker.index), own.task = number;
    own.begin_ns = TaskTrace::now_ns();
    task(worker, subpool, number);
    own.end_ns = TaskTrace::now_ns();
    trace->add(own);
  };
  run(recorded);
}

// ---- stats and traces ----

void SharedLayer::start_stats(bool on) {
  const std::lock_guard lock(mutex_);
  stats_.reset();
  if (on) stats_ = no_stats();
}

PassStats SharedLayer::no_stats() const {
  PassStats stats;
  stats.expert_tokens.assign(static_cast<size_t>(config_.expert_num), 0);
  return stats;
}

bool SharedLayer::has_stats() const {
  const std::lock_guard lock(mutex_);
  return stats_.has_value();
}

PassStats SharedLayer::read_stats(bool reset) {
  const std::lock_guard lock(mutex_);
  if (!stats_)
    throw_runtime("stats: layer ", config_.layer_idx, " does not collect any, call collect_stats() first");
  return reset ? std::exchange(*stats_, no_stats()) : *stats_;
}

SharedLayer::PhaseScope::PhaseScope(SharedLayer& layer, Phase phase)
    : layer_(layer),
      is_measured_(layer.stats_.has_value() || layer.config_.pool->trace() != nullptr),
      begin_(is_measured_ ? TaskTrace::now_ns() : 0) {
  layer.phase_ = phase;
}

SharedLayer::PhaseScope::~PhaseScope() {
  if (!is_measured_) return;
  const int64_t end = TaskTrace::now_ns();
  const auto phase = static_cast<size_t>(layer_.phase_);
  if (layer_.stats_) layer_.stats_->phase_ns[phase] += end - begin_;
  if (TaskTrace* const trace = layer_.config_.pool->trace())
    trace->add({kPhaseNames[phase], layer_.config_.layer_idx, TaskTrace::kPhase, 0, begin_, end});
}

// ---- borrowed scratch ----

void SharedLayer::QuantizedScratch::take(const SharedLayer& layer, ScratchPlan& plan) {
  const LayerCall& call = layer.call_;
  const uint32_t hidden = layer.hidden_size(), width = layer.intermediate_size();
  const size_t num_inputs = call.num_inputs(), num_rows = call.plan.num_rows();
  if (layer.kernel_.is_integer) {
    x_ = plan.take(kernels::Int8Rows::bytes(num_inputs, hidden));
    h_ = plan.take(kernels::Int8Rows::bytes(num_rows, width));
  }
  for (uint32_t block : {128u, 256u})
    if (call.blocks.takes(block))
      x_blocks_[block == 256] = plan.take(num_inputs * kernels::BlockRowLayout(hidden, block).stride());
  if (call.blocks.down != 0)
    h_blocks_ = plan.take(num_rows * kernels::BlockRowLayout(width, call.blocks.down).stride());
}

void SharedLayer::QuantizedScratch::place(SharedLayer& layer, std::byte* base) const {
  LayerCall& call = layer.call_;
  if (layer.kernel_.is_integer) {
    call.x8 = kernels::Int8Rows::in(base + x_, call.num_inputs(), layer.hidden_size());
    call.h8 = kernels::Int8Rows::in(base + h_, call.plan.num_rows(), layer.intermediate_size());
  }
  for (size_t i = 0; i < 2; ++i) call.x_blocks[i] = base + x_blocks_[i];
  call.h_blocks = base + h_blocks_;
}

SharedLayer::InferenceScratch::InferenceScratch(const SharedLayer& layer, uint32_t sweeps) {
  const auto& k = *layer.call_.kernels;
  const uint32_t width = layer.intermediate_size(), hidden = layer.hidden_size();
  scaled_ = plan.take(layer.scaled_bytes());
  quantized_.take(layer, plan);
  if (layer.call_.keeps_h_rows(layer.kernel_)) {
    h_rows_ = plan.take(layer.call_.plan.num_rows() * layer.call_.h_stride() * sizeof(bf16));
  } else {
    for (const auto& expert : layer.call_.plan.active)
      h_.push_back(plan.take(k.operand_bytes(expert.rows, width)));
  }
  y = layer.take_y(plan, sweeps);

  const auto most_rows = [&](uint32_t size) { return layer.most_rows(layer.call_.nt_block_k(size)); };
  const uint32_t most = std::max(most_rows(hidden), most_rows(width));
  const auto operand_bytes = [&](uint32_t size) {
    return round_up(layer.kernel_.operand_bytes(k, most_rows(size), size), kCacheLine);
  };
  const auto panels_bytes = [&](uint32_t size) { return k.block_panels_bytes(most_rows(size), size); };
  operand_ = std::max(operand_bytes(hidden), layer.kernel_.is_integer ? operand_bytes(width) : 0);
  if (layer.call_.blocks.any())
    operand_ = std::max(
        {operand_, round_up(panels_bytes(hidden), kCacheLine), round_up(panels_bytes(width), kCacheLine)});
  c_ = round_up(k.c_floats(most, kernels::kMaxCallOutputs) * sizeof(float), kCacheLine);
  per_worker_ = operand_ + 2 * c_ + round_up(k.nt_scratch_bytes(std::max(width, hidden)), kCacheLine);
  workers_ = plan.take(per_worker_ * static_cast<size_t>(layer.config_.pool->num_threads()));
}

void SharedLayer::InferenceScratch::place(SharedLayer& layer, std::byte* base) const {
  LayerCall& call = layer.call_;
  layer.place_scaled(base + scaled_);
  call.h.clear();
  for (size_t at : h_) call.h.push_back(base + at);
  quantized_.place(layer, base);
  call.h_rows = reinterpret_cast<bf16*>(base + h_rows_);
  call.workers.resize(static_cast<size_t>(layer.config_.pool->num_threads()));
  for (size_t i = 0; i < call.workers.size(); ++i) {
    std::byte* own = base + workers_ + i * per_worker_;
    call.workers[i] = {static_cast<uint32_t>(i),
                       PackedRows{},
                       own,
                       reinterpret_cast<float*>(own + operand_),
                       reinterpret_cast<float*>(own + operand_ + c_),
                       own + operand_ + 2 * c_};
  }
}

}  // namespace ktmoe
