#include "xla/deferred.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/error.h"
#include "moe/deferred_pass.h"
#include "runtime/per_process.h"
#include "xla/batch.h"
#include "xla/host_task.h"

namespace ktmoe::xla {
namespace {

// Deferred outputs that wait for the next layer's call, by number. A program that stops half-way never takes
// its last one, so their number is limited.
class DeferredOutputs {
 public:
  using Output = std::shared_ptr<DeferredOutput>;

  static DeferredOutputs& all() { return of_this_process<DeferredOutputs>(); }

  uint32_t add(Output output) {
    const std::lock_guard lock(mutex_);
    const uint32_t number = next_number();
    outputs_[number] = std::move(output);
    order_.push_back(number);
    while (outputs_.size() > kMost || outputs_.count(order_.front()) == 0) {
      outputs_.erase(order_.front());
      order_.pop_front();
    }
    return number;
  }

  // Null for the number 0, std::runtime_error for one that is not there.
  Output at(uint32_t number) {
    const std::lock_guard lock(mutex_);
    return number == 0 ? nullptr : find(number)->second;
  }

  // It is used once.
  void remove(uint32_t number) {
    const std::lock_guard lock(mutex_);
    if (number != 0) outputs_.erase(find(number));
  }

 private:
  // Of programs that run at the same time, or stop half-way.
  static constexpr size_t kMost = 64;
  using Outputs = std::map<uint32_t, Output>;

  Outputs::iterator find(uint32_t number) {
    const auto found = outputs_.find(number);
    if (found == outputs_.end())
      throw_runtime("carry: got one that was used before, or waited while ", kMost,
                    " others came, expected every carry to be used once");
    return found;
  }

  // Never 0; those of a parent process are not used again.
  static uint32_t next_number() {
    static std::atomic<uint32_t> last{0};
    uint32_t number = 0;
    while (number == 0) number = ++last;
    return number;
  }

  std::mutex mutex_;
  Outputs outputs_;
  std::deque<uint32_t> order_;  // as they came
};

uint32_t take_carry(Call& call) {
  return *static_cast<uint32_t*>(elements_of(call.next_arg("carry"), "carry", DataType::kUint32, 1));
}

template <class T>
using Memory = std::unique_ptr<T[]>;

// Pages that are never written to take no memory.
template <class T>
Memory<T> allocate(size_t num) {
  return std::make_unique_for_overwrite<T[]>(num);
}

// A deferred output with memory of its own, which outlives the layer.
struct OwningOutput {
  OwningOutput(const GeneralMOEConfig& config, uint32_t num_tokens)
      : memory(allocate<float>(size_t{num_tokens} * static_cast<size_t>(config.hidden_size))),
        output(memory.get(), config, num_tokens) {}

  Memory<float> memory;
  DeferredOutput output;
};

std::shared_ptr<DeferredOutput> new_output(const CalledLayer& called, uint32_t num_tokens) {
  if (called.num_deferred == 0) return nullptr;
  const auto owning = std::make_shared<OwningOutput>(called.layer->config(), num_tokens);
  return {owning, &owning->output};
}

// A pass of a call, and copies of what its deferred part reads when the call has returned and the program's
// arrays are gone.
class ProgramPass {
 public:
  ProgramPass(const Batch& batch, void* out, std::shared_ptr<const DeferredOutput> received)
      : called_(batch.called()),
        num_routes_(size_t{batch.rows().num_tokens} *
                    static_cast<size_t>(batch.config().num_experts_per_tok)),
        ids_(allocate<int64_t>(2 * num_routes_)),
        hidden_states_(allocate<bf16>(size_t{batch.rows().num_tokens} *
                                      static_cast<size_t>(batch.config().hidden_size))),
        weights_(allocate<float>(num_routes_)),
        pass_(called_->layer, arrays(batch, out), std::move(received),
              new_output(*called_, batch.rows().num_tokens)) {}

  DeferredPass& pass() { return pass_; }

 private:
  DeferringBatch arrays(const Batch& batch, void* out) const {
    DeferringBatch all;
    all.args = batch.rows();
    all.args.out = out;
    all.ids = batch.ids();
    all.num_deferred = called_->num_deferred, all.chunk_size = called_->chunk_size;
    all.immediate_ids = ids_.get();
    if (called_->num_deferred == 0) return all;
    all.deferred_ids = ids_.get() + num_routes_;
    all.copied_hidden_states = hidden_states_.get(), all.copied_weights = weights_.get();
    return all;
  }

  std::shared_ptr<CalledLayer> called_;
  size_t num_routes_;
  Memory<int64_t> ids_;  // immediate, then deferred
  Memory<bf16> hidden_states_;
  Memory<float> weights_;
  DeferredPass pass_;
};

// Does all that is given, and throws the first exception in the end.
class Attempts {
 public:
  void operator()(FunctionRef<void()> work) {
    try {
      work();
    } catch (...) {
      if (first_ == nullptr) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_ != nullptr) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// The deferred part is submitted behind the immediate one, for which alone the call waits: until then the
// tasks refer to the program's arrays.
void run_parts(CPUInfer& engine, const std::shared_ptr<ProgramPass>& pass) {
  std::vector<Ticket> tickets;
  Attempts attempt;
  const size_t num = pass->pass().num_chunks();
  attempt([&] {
    for (size_t i = 0; i < num; ++i) {
      auto work = std::make_unique<HostTask>([pass, i] { pass->pass().compute_immediate(i); });
      tickets.push_back(engine.submit(std::move(work), /*wake=*/false));
    }
    const bool has_deferred = pass->pass().output() != nullptr && !pass->pass().is_joint();
    for (size_t i = 0; has_deferred && i < num; ++i)
      engine.submit(std::make_unique<HostTask>([pass, i] {
        try {
          pass->pass().compute_deferred(i);
        } catch (...) {  // the output has it, for the next layer's call
        }
      }));
  });
  for (const Ticket& ticket : tickets) attempt([&] { engine.wait(ticket); });
  attempt.rethrow();
}

}  // namespace

void do_forward_deferred(Call& call) {
  const Batch batch(call);
  const uint32_t number = take_carry(call);
  const std::shared_ptr<DeferredOutput> received = DeferredOutputs::all().at(number);
  void* out = batch.take_out(call);
  auto* carry = static_cast<uint32_t*>(elements_of(call.next_result("carry"), "carry", DataType::kUint32, 1));
  const auto pass = std::make_shared<ProgramPass>(batch, out, received);
  pass->pass().split();
  DeferredOutputs::all().remove(number);
  run_parts(*batch.called()->engine, pass);
  const std::shared_ptr<DeferredOutput>& output = pass->pass().output();
  *carry = output == nullptr ? 0 : DeferredOutputs::all().add(output);
}

void do_drain_deferred(Call& call) {
  const uint32_t number = take_carry(call);
  const std::shared_ptr<DeferredOutput> output = DeferredOutputs::all().at(number);
  const Buffer& result = call.next_result("out");
  const int64_t hidden = result.rank > 0 ? result.dims[result.rank - 1] : 0;
  const Rows out = rows_of(result, "out", DataType::kBf16, hidden);
  if (output == nullptr) {
    std::fill_n(out.as<bf16>(), static_cast<size_t>(out.num) * static_cast<size_t>(hidden), bf16{});
    return;
  }
  output->check_shape(static_cast<uint32_t>(out.num), hidden);
  DeferredOutputs::all().remove(number);
  output->wait_until_ready();
  output->rethrow();
  output->round_to(out.as<bf16>());
}

}  // namespace ktmoe::xla
