#include "xla/handlers.h"

#include <atomic>
#include <climits>
#include <functional>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "xla/call.h"
#include "xla/layers.h"

namespace ktmoe::xla {
namespace {

std::mutex addresses_mutex;
Addresses addresses;

// Work on the engine that refers to nothing of Python's.
class Work final : public Task {
 public:
  explicit Work(std::function<void()> work) : work_(std::move(work)) {}
  void run() override { work_(); }
  bool ends_anywhere() const override { return true; }

 private:
  std::function<void()> work_;
};

// On the engine's threads and this one, after what was submitted before. It waits until the work is done,
// which may so refer to the caller's stack; only a caller within a task could not wait, and XLA is none.
void run(CPUInfer& engine, std::function<void()> work) {
  engine.wait(engine.submit(std::make_unique<Work>(std::move(work)), /*wake=*/false));
}

// The arguments that all have.
class Batch {
 public:
  explicit Batch(Call& call) {
    const Buffer& number = call.next_arg("layer");
    called_ = Layers::all().at(*static_cast<int32_t*>(elements_of(number, "layer", DataType::kInt32, 1)));
    const GeneralMOEConfig& c = config();
    const Rows x = rows_of(call.next_arg("hidden_states"), "hidden_states", DataType::kBf16, c.hidden_size);
    if (x.num * c.num_experts_per_tok > INT32_MAX)
      throw_invalid("hidden_states: got ", x.num, " tokens, expected fewer in one call");
    args_.num_tokens = static_cast<uint32_t>(x.num), args_.hidden_states = x.as<bf16>();
    take_ids(call.next_arg("topk_ids"));
    args_.topk_weights = rows_of(call.next_arg("topk_weights"), "topk_weights", DataType::kFloat32,
                                 c.num_experts_per_tok, x.num)
                             .as<float>();
    if (!called_->skip_experts.empty()) args_.skip_experts = called_->skip_experts.data();
  }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  CalledLayer& called() const { return *called_; }
  const GeneralMOEConfig& config() const { return called_->layer->config(); }
  int64_t num_tokens() const { return args_.num_tokens; }
  MoE_SFT_Interface& training() const {
    if (called_->training == nullptr) throw_invalid("layer: got one for inference, expected one that trains");
    return *called_->training;
  }

  // Of a pass that writes to `out`.
  ForwardArgs args(void* out) const {
    ForwardArgs args = args_;
    args.out = out;
    return args;
  }

  void* take_out(Call& call) const {
    return rows_of(call.next_result("out"), "out", DataType::kBf16, config().hidden_size, num_tokens())
        .as<void>();
  }

 private:
  // The engine takes ids in int64, JAX mostly has them in int32.
  void take_ids(const Buffer& buffer) {
    const GeneralMOEConfig& c = config();
    const bool is_long = buffer.dtype == DataType::kInt64;
    const Rows rows = rows_of(buffer, "topk_ids", is_long ? DataType::kInt64 : DataType::kInt32,
                              c.num_experts_per_tok, args_.num_tokens);
    if (is_long) {
      args_.topk_ids = rows.as<int64_t>();
    } else {
      const auto* begin = rows.as<int32_t>();
      ids_.assign(begin, begin + rows.num * c.num_experts_per_tok);
      args_.topk_ids = ids_.data();
    }
  }

  std::shared_ptr<CalledLayer> called_;
  std::vector<int64_t> ids_;
  ForwardArgs args_;
};

LoraSources take_lora(Call& call, const MOESFTConfig& c) {
  LoraSources sources;
  for (size_t i = 0; i < kNumLora; ++i) {
    const LoraShape shape = lora_shape(c, static_cast<LoraId>(i));
    if (shape.size() == 0) continue;
    const Buffer& buffer = call.next_arg(shape.name);
    const bool is_bf16 = buffer.dtype == DataType::kBf16;
    const void* data = elements_of(buffer, shape.name, is_bf16 ? DataType::kBf16 : DataType::kFloat32,
                                   c.expert_num * static_cast<int64_t>(shape.size()));
    sources[i] = {data, is_bf16 ? kernels::FloatType::kBf16 : kernels::FloatType::kFloat32};
  }
  return sources;
}

// A pass with those adapters, in a task of the engine. One that is kept, under a number, takes the place of
// all before.
void run_with_adapters(const Batch& batch, const LoraSources& lora, void* out, uint32_t number) {
  MoE_SFT_Interface& layer = batch.training();
  const bool save = number != 0;
  if (save) layer.forget_forwards();
  layer.update_lora_weights(lora);
  layer.forward_sft(batch.args(out), save, number);
}

uint32_t next_pass() {
  static std::atomic<uint32_t> last{0};
  uint32_t pass = 0;
  while (pass == 0) pass = ++last;
  return pass;
}

void note(const Addresses& now) {
  const std::lock_guard lock(addresses_mutex);
  addresses = now;
}

void do_forward(Call& call) {
  const Batch batch(call);
  void* out = batch.take_out(call);
  note({.hidden_states = batch.args(out).hidden_states, .out = out});
  run(*batch.called().engine, [&] { batch.called().layer->forward(batch.args(out)); });
}

void do_forward_sft(Call& call) {
  const Batch batch(call);
  const LoraSources lora = take_lora(call, batch.training().sft_config());
  void* out = batch.take_out(call);
  note({.hidden_states = batch.args(out).hidden_states, .out = out});
  run(*batch.called().engine, [&] { run_with_adapters(batch, lora, out, 0); });
}

void do_forward_saved(Call& call) {
  const Batch batch(call);
  const LoraSources lora = take_lora(call, batch.training().sft_config());
  void* out = batch.take_out(call);
  auto* pass = static_cast<uint32_t*>(elements_of(call.next_result("pass"), "pass", DataType::kUint32, 1));
  note({.hidden_states = batch.args(out).hidden_states, .out = out});
  *pass = next_pass();
  run(*batch.called().engine, [&] { run_with_adapters(batch, lora, out, *pass); });
}

// The gradients of the adapters, when the call wants them.
void take_lora_gradients(Call& call, const MOESFTConfig& c, BackwardArgs& args) {
  if (call.num_results() == 2) return;
  for (size_t i = 0; i < kNumLora; ++i) {
    const LoraShape shape = lora_shape(c, static_cast<LoraId>(i));
    if (shape.size() == 0) continue;
    args.lora[i] =
        static_cast<float*>(elements_of(call.next_result(shape.name), shape.name, DataType::kFloat32,
                                        c.expert_num * static_cast<int64_t>(shape.size())));
  }
}

void do_backward(Call& call) {
  const Batch batch(call);
  MoE_SFT_Interface& layer = batch.training();
  const MOESFTConfig& c = layer.sft_config();
  const LoraSources lora = take_lora(call, c);
  const uint32_t pass =
      *static_cast<uint32_t*>(elements_of(call.next_arg("pass"), "pass", DataType::kUint32, 1));
  const int64_t tokens = batch.num_tokens();
  BackwardArgs args;
  args.num_tokens = static_cast<uint32_t>(tokens);
  args.grad_output =
      rows_of(call.next_arg("grad_output"), "grad_output", DataType::kBf16, c.hidden_size, tokens).as<bf16>();
  args.grad_input =
      rows_of(call.next_result("grad_input"), "grad_input", DataType::kBf16, c.hidden_size, tokens)
          .as<bf16>();
  args.grad_weights = rows_of(call.next_result("grad_weights"), "grad_weights", DataType::kFloat32,
                              c.num_experts_per_tok, tokens)
                          .as<float>();
  take_lora_gradients(call, c, args);
  note({batch.args(nullptr).hidden_states, nullptr, args.grad_output, args.grad_input});
  run(*batch.called().engine, [&] {
    if (!layer.is_last(pass, args.num_tokens)) {
      std::vector<bf16> out(static_cast<size_t>(tokens * c.hidden_size));
      run_with_adapters(batch, lora, out.data(), next_pass());
    }
    layer.backward(args);
  });
}

}  // namespace

Error* forward(CallFrame* frame) { return handle(frame, "moe_forward", do_forward); }
Error* forward_sft(CallFrame* frame) { return handle(frame, "moe_sft", do_forward_sft); }
Error* forward_saved(CallFrame* frame) { return handle(frame, "moe_sft", do_forward_saved); }
Error* backward(CallFrame* frame) { return handle(frame, "moe_sft backward", do_backward); }

Addresses last_addresses() {
  const std::lock_guard lock(addresses_mutex);
  return addresses;
}

}  // namespace ktmoe::xla
