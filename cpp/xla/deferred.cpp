#include "xla/deferred.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "core/error.h"
#include "moe/plan/split_slots.h"
#include "runtime/per_process.h"
#include "xla/batch.h"
#include "xla/work.h"

namespace ktmoe::xla {
namespace {

// The deferred part of a pass: copies of what it reads when the call has returned and the program's arrays
// are gone, and what comes of it.
struct DeferredPart {
  uint32_t num_tokens = 0;
  std::vector<bf16> hidden_states;          // [T, H]
  std::vector<int64_t> topk_ids;            // [T, P]
  std::vector<float> topk_weights, output;  // [T, P], [T, H]
  std::exception_ptr error;
  std::atomic<bool> is_done{false};

  void compute(CalledLayer& called) {
    ForwardArgs args;
    args.num_tokens = num_tokens, args.hidden_states = hidden_states.data();
    args.topk_ids = topk_ids.data(), args.topk_weights = topk_weights.data();
    if (!called.skip_experts.empty()) args.skip_experts = called.skip_experts.data();
    args.out = output.data(), args.out_type = kernels::FloatType::kFloat32;
    try {
      called.layer->forward(args);
    } catch (...) {
      error = std::current_exception();
    }
    set_done();
  }

  void set_done() {
    is_done.store(true);
    is_done.notify_all();
  }
};

// Those that wait for the layer after them. A program that stops half-way never takes the last of them, so
// only so many are kept.
class Waiting {
 public:
  static Waiting& all() { return of_this_process<Waiting>(); }

  uint32_t add(std::shared_ptr<DeferredPart> part) {
    const std::lock_guard lock(mutex_);
    const uint32_t number = next_number();
    parts_[number] = std::move(part);
    order_.push_back(number);
    while (parts_.size() > kMost || parts_.count(order_.front()) == 0) {
      parts_.erase(order_.front());
      order_.pop_front();
    }
    return number;
  }

  // Null for the number 0, std::runtime_error for one that is not there.
  std::shared_ptr<DeferredPart> at(uint32_t number) {
    const std::lock_guard lock(mutex_);
    return number == 0 ? nullptr : find(number)->second;
  }

  // Takes it away: it is used once.
  void remove(uint32_t number) {
    const std::lock_guard lock(mutex_);
    if (number != 0) parts_.erase(find(number));
  }

 private:
  // Of programs that are run at the same time, or do not end.
  static constexpr size_t kMost = 64;
  using Parts = std::map<uint32_t, std::shared_ptr<DeferredPart>>;

  Parts::iterator find(uint32_t number) {
    const auto found = parts_.find(number);
    if (found == parts_.end())
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
  Parts parts_;
  std::deque<uint32_t> order_;  // as they came
};

uint32_t take_carry(Call& call) {
  return *static_cast<uint32_t*>(elements_of(call.next_arg("carry"), "carry", DataType::kUint32, 1));
}

std::string shape_of(uint32_t num_tokens, size_t size) {
  return str_cat("[", num_tokens, ", ", num_tokens == 0 ? 0 : size / num_tokens, "]");
}

// A batch whose routing is split.
struct SplitBatch {
  std::vector<int64_t> immediate_ids;  // [T, P]
  std::shared_ptr<DeferredPart> deferred;
  bool is_joint = false;  // see SlotSplit
};

SplitBatch split(const Batch& batch) {
  const GeneralMOEConfig& c = batch.config();
  const ForwardArgs args = batch.args(nullptr);
  const auto slots = static_cast<uint32_t>(c.num_experts_per_tok);
  const size_t routes = size_t{args.num_tokens} * slots;
  const size_t hidden = size_t{args.num_tokens} * static_cast<size_t>(c.hidden_size);
  SplitBatch result;
  result.immediate_ids.resize(routes);
  result.deferred = std::make_shared<DeferredPart>();
  DeferredPart& part = *result.deferred;
  part.num_tokens = args.num_tokens;
  part.topk_ids.resize(routes), part.output.resize(hidden);
  SlotSplit split;
  split.ids = args.topk_ids, split.weights = args.topk_weights;
  split.num_tokens = args.num_tokens, split.num_slots = slots;
  split.num_experts = static_cast<uint32_t>(c.expert_num);
  split.num_deferred = batch.called()->num_deferred;
  split.immediate = result.immediate_ids.data(), split.deferred = part.topk_ids.data();
  split.run();
  result.is_joint = split.is_joint;
  if (!split.is_joint) {
    part.hidden_states.assign(args.hidden_states, args.hidden_states + hidden);
    part.topk_weights.assign(args.topk_weights, args.topk_weights + routes);
  }
  return result;
}

}  // namespace

void do_forward_deferred(Call& call) {
  const Batch batch(call);
  const uint32_t carry = take_carry(call);
  const std::shared_ptr<DeferredPart> before = Waiting::all().at(carry);
  void* out = batch.take_out(call);
  auto* left = static_cast<uint32_t*>(elements_of(call.next_result("carry"), "carry", DataType::kUint32, 1));
  ForwardArgs args = batch.args(out);
  const GeneralMOEConfig& c = batch.config();
  if (before != nullptr) {
    const size_t size = size_t{args.num_tokens} * static_cast<size_t>(c.hidden_size);
    if (before->num_tokens != args.num_tokens || before->output.size() != size)
      throw_invalid("hidden_states: got ", shape_of(args.num_tokens, size), ", expected ",
                    shape_of(before->num_tokens, before->output.size()), ", as the carry has");
    args.base = before->output.data(), args.base_type = kernels::FloatType::kFloat32;
  }
  SplitBatch parts;
  if (batch.called()->num_deferred > 0) {
    parts = split(batch);
    args.topk_ids = parts.immediate_ids.data();
    if (parts.is_joint)
      args.deferred_ids = parts.deferred->topk_ids.data(), args.deferred_out = parts.deferred->output.data();
  }
  const std::shared_ptr<DeferredPart>& part = parts.deferred;
  Waiting::all().remove(carry);
  CPUInfer& engine = *batch.called()->engine;
  // It refers to this frame, which nothing may leave before it is done.
  const auto at_once = [&] {
    if (before != nullptr && before->error != nullptr) std::rethrow_exception(before->error);
    batch.called()->layer->forward(args);
  };
  const Ticket ticket = engine.submit(std::make_unique<Work>(at_once), /*wake=*/false);
  std::exception_ptr refused;
  if (part != nullptr && !parts.is_joint) {
    try {
      engine.submit(std::make_unique<Work>([part, called = batch.called()] { part->compute(*called); }));
    } catch (...) {
      refused = std::current_exception();
    }
  }
  engine.wait(ticket);
  if (parts.is_joint) part->set_done();
  if (refused != nullptr) std::rethrow_exception(refused);
  *left = part == nullptr ? 0 : Waiting::all().add(part);
}

void do_drain_deferred(Call& call) {
  const uint32_t carry = take_carry(call);
  const std::shared_ptr<DeferredPart> part = Waiting::all().at(carry);
  const Buffer& result = call.next_result("out");
  const int64_t hidden = result.rank > 0 ? result.dims[result.rank - 1] : 0;
  const Rows out = rows_of(result, "out", DataType::kBf16, hidden);
  const size_t size = static_cast<size_t>(out.num) * static_cast<size_t>(hidden);
  if (part == nullptr) {
    std::fill_n(out.as<bf16>(), size, bf16{});
    return;
  }
  if (part->output.size() != size)
    throw_invalid("hidden_states: got ", shape_of(static_cast<uint32_t>(out.num), size), ", expected ",
                  shape_of(part->num_tokens, part->output.size()), ", as the carry has");
  Waiting::all().remove(carry);
  part->is_done.wait(false);
  if (part->error != nullptr) std::rethrow_exception(part->error);
  to_bf16(part->output.data(), out.as<bf16>(), size);
}

}  // namespace ktmoe::xla
