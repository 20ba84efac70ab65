// The expert layers for training in Python: one class per method.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <utility>

#include "bindings/convert/gradient_arrays.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "bindings/layers/training_config.h"
#include "sft/cache_stack.h"
#include "sft/tp_moe_sft.h"

namespace ktmoe::bindings {
namespace {

using TrainedLayer = std::shared_ptr<MoE_SFT_Interface>;

// A pass that may be taken back.
class TrainingTask : public PythonTask {
 public:
  TrainingTask(std::shared_ptr<TrainingCall> call, std::function<void()> work,
               std::shared_ptr<const Arrays> arrays)
      : PythonTask(std::move(work), std::move(arrays)), call_(std::move(call)) {}
  // Who could take the pass back is gone.
  ~TrainingTask() {
    if (call_ != nullptr) call_->finish();
  }
  TrainingTask(TrainingTask&&) = default;
  TrainingTask& operator=(TrainingTask&&) = delete;
  void revoke() { call_->revoke(); }

 private:
  std::shared_ptr<TrainingCall> call_;
};

PythonTask update_lora_weights_task(TrainedLayer layer, nb::handle gate_a, nb::handle gate_b, nb::handle up_a,
                                    nb::handle up_b, nb::handle down_a, nb::handle down_b) {
  const LoraHandles handles = {gate_a, gate_b, up_a, up_b, down_a, down_b};
  if (std::all_of(handles.begin(), handles.end(), [](nb::handle h) { return h.is_none(); }))
    throw_invalid("update_lora_weights: got no matrix, expected at least one of ",
                  "gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b");
  const auto owners = std::make_shared<Arrays>();
  const LoraSources sources = read_lora(layer->sft_config(), handles, *owners);
  return PythonTask([layer, sources, owners] { layer->update_lora_weights(sources); }, owners);
}

PythonTask set_adapter_task(TrainedLayer layer, uint32_t number, int64_t lora_rank, double lora_alpha,
                            nb::handle gate_a, nb::handle gate_b, nb::handle up_a, nb::handle up_b,
                            nb::handle down_a, nb::handle down_b) {
  MOESFTConfig config = layer->sft_config();
  config.lora_rank = lora_rank, config.lora_alpha = lora_alpha, config.lora_dropout = 0;
  config.validate();
  const auto owners = std::make_shared<Arrays>();
  const LoraSources sources = read_lora(config, {gate_a, gate_b, up_a, up_b, down_a, down_b}, *owners);
  return PythonTask([layer, number, sources, config, owners] { layer->set_adapter(number, sources, config); },
                    owners);
}

PythonTask remove_adapter_task(TrainedLayer layer, uint32_t number) {
  return PythonTask([layer, number] { layer->remove_adapter(number); });
}

TrainingTask forward_sft_task(TrainedLayer layer, nb::object hidden_states, nb::object topk_ids,
                              nb::object topk_weights, nb::object out, bool save_for_backward,
                              nb::object skip_experts, const std::optional<std::string>& activation_dtype,
                              bool expert_rows) {
  ForwardArrays forward(layer->config(), hidden_states, topk_ids, topk_weights, out, skip_experts,
                        expert_rows ? Output::kExpertRows : Output::kSums);
  forward.set_activation_dtype(activation_dtype_of(*layer, activation_dtype));
  const auto arrays = forward.arrays();
  const std::shared_ptr<TrainingCall> call = layer->new_call();
  return TrainingTask(
      call,
      [layer, call, forward = std::move(forward), save_for_backward] {
        layer->forward_sft(forward.args(), save_for_backward, 0, call.get());
      },
      arrays);
}

TrainingTask backward_task(TrainedLayer layer, nb::handle grad_output, nb::handle grad_input,
                           nb::handle grad_weights, nb::handle gate_a, nb::handle gate_b, nb::handle up_a,
                           nb::handle up_b, nb::handle down_a, nb::handle down_b, nb::handle gate_proj,
                           nb::handle up_proj, nb::handle down_proj, bool accumulate, bool expert_rows) {
  GradientArrays arrays(layer->sft_config(), grad_output, grad_input, grad_weights,
                        expert_rows ? Output::kExpertRows : Output::kSums);
  arrays.write_lora({gate_a, gate_b, up_a, up_b, down_a, down_b});
  arrays.write_projections(gate_proj, up_proj, down_proj);
  BackwardArgs args = arrays.args();
  args.accumulate = accumulate;
  const auto owners = std::make_shared<Arrays>(arrays.take());
  const std::shared_ptr<TrainingCall> call = layer->new_call();
  return TrainingTask(call, [layer, call, args, owners] { layer->backward(args, call.get()); }, owners);
}

PythonTask clear_cache_task(TrainedLayer layer) {
  return PythonTask([layer] { layer->clear_cache(); });
}

using Interface = nb::class_<MoE_SFT_Interface, MoE_Interface>;

void bind_forward(Interface& interface) {
  const auto none = nb::none();
  interface
      .def("update_lora_weights_task", &update_lora_weights_task, nb::arg("gate_lora_a").none() = none,
           nb::arg("gate_lora_b").none() = none, nb::arg("up_lora_a").none() = none,
           nb::arg("up_lora_b").none() = none, nb::arg("down_lora_a").none() = none,
           nb::arg("down_lora_b").none() = none,
           R"(Make the task that gives the adapters new values; matrices that are None do not change, at least one is given.

Parameters
----------
gate_lora_a, up_lora_a : array, optional
    float32 or bfloat16 [E, R, H]. Copied when the task runs, as bfloat16.
gate_lora_b, up_lora_b : array, optional
    [E, I, R].
down_lora_a, down_lora_b : array, optional
    [E, R, I] and [E, H, R].

Returns
-------
Task)")
      .def("forward_sft_task", &forward_sft_task, nb::arg("hidden_states").none(), nb::arg("topk_ids").none(),
           nb::arg("topk_weights").none(), nb::arg("out").none(), nb::arg("save_for_backward") = true,
           nb::kw_only(), nb::arg("skip_experts").none() = none, nb::arg("activation_dtype").none() = none,
           nb::arg("expert_rows") = false,
           R"(Make the task of one forward pass with adapters.

Parameters
----------
hidden_states, topk_ids, topk_weights, out, skip_experts, activation_dtype
    As in forward_task.
save_for_backward : bool
    Keep what backward_task needs; dropout acts only then.
expert_rows : bool
    `out` is float32 [S, H], written as in `expert_rows_task`.

Returns
-------
TrainingTask)");
}

void bind_adapters(Interface& interface) {
  const auto none = nb::none();
  interface
      .def("set_adapter_task", &set_adapter_task, nb::arg("number"), nb::arg("lora_rank"),
           nb::arg("lora_alpha"), nb::arg("gate_lora_a").none() = none, nb::arg("gate_lora_b").none() = none,
           nb::arg("up_lora_a").none() = none, nb::arg("up_lora_b").none() = none,
           nb::arg("down_lora_a").none() = none, nb::arg("down_lora_b").none() = none,
           R"(Make the task that stores an adapter for inference under a number, in place of one that is there.

Parameters
----------
number : int
    By which `adapters` of forward passes name it.
lora_rank : int
    R of this adapter.
lora_alpha : float
    Its scale times R.
gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b : array, optional
    As in `update_lora_weights_task`; zeros where None. Copied when the task runs.

Returns
-------
Task)")
      .def("remove_adapter_task", &remove_adapter_task, nb::arg("number"),
           "Make the task that frees the adapter of that number, if there is one.");
}

void bind_backward(Interface& interface) {
  const auto none = nb::none();
  interface
      .def("backward_task", &backward_task, nb::arg("grad_output").none(), nb::arg("grad_input").none(),
           nb::arg("grad_weights").none(), nb::kw_only(), nb::arg("gate_lora_a").none() = none,
           nb::arg("gate_lora_b").none() = none, nb::arg("up_lora_a").none() = none,
           nb::arg("up_lora_b").none() = none, nb::arg("down_lora_a").none() = none,
           nb::arg("down_lora_b").none() = none, nb::arg("gate_proj").none() = none,
           nb::arg("up_proj").none() = none, nb::arg("down_proj").none() = none,
           nb::arg("accumulate") = false, nb::arg("expert_rows") = false,
           R"(Make the task of the backward pass of the last forward pass that was saved.

Parameters
----------
grad_output : array
    bfloat16 [T, H].
grad_input : array
    bfloat16 [T, H], written.
grad_weights : array
    float32 [T, P], written: the gradient of the routing weights.
gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b : array, optional
    float32 gradients of the adapters, written. None: not computed.
gate_proj, up_proj, down_proj : array, optional
    float32 gradients of the weights, [E, I, H], [E, I, H], [E, H, I].
accumulate : bool
    Add the gradients of matrices to the contents of the arrays.
expert_rows : bool
    grad_input is float32 [S, H]: the gradient of what entered each slot's expert, one row for each slot that
    is not skipped. Where routing weights scale the inputs, they are not applied to it.

Returns
-------
TrainingTask)")
      .def("clear_cache_task", &clear_cache_task, "Make the task that drops the saved forward passes.")
      .def_prop_ro("num_cached", &MoE_SFT_Interface::num_cached,
                   "Forward passes that wait for their backward pass.")
      .def_prop_ro("cache_bytes", &MoE_SFT_Interface::cache_bytes, "Memory of saved forward passes, and memory kept for the next ones.")
      .def_prop_rw("step", &MoE_SFT_Interface::step, &MoE_SFT_Interface::set_step,
                   "The number of the next saving forward pass, which keys its dropout masks.");
}

// One class per method.
template <size_t kIndex>
struct TrainingLayer final : TP_MOE_SFT {
  TrainingLayer(const MOESFTConfig& config, const LoraSources& lora)
      : TP_MOE_SFT(config, gemm_kernel(kMethods[kIndex], config), lora) {}
};

template <size_t kIndex>
void bind_layer(nb::module_& m) {
  using Trained = TrainingLayer<kIndex>;
  nb::class_<Trained, MoE_SFT_Interface>(m, kMethods[kIndex].training_class, kMethods[kIndex].training_text)
      .def(
          "__init__",
          [](Trained* self, SFTConfig config) {  // a copy: reading arrays may run Python, which may change it
            config.validate();
            Arrays owners;
            new (self) Trained(config, read_lora(config, config.lora_handles(), owners));
          },
          nb::arg("config"));
}

template <size_t... kIndices>
void bind_training_layers(nb::module_& m, std::index_sequence<kIndices...>) {
  (bind_layer<kIndices>(m), ...);
}

}  // namespace

void bind_sft(nb::module_& m) {
  bind_sft_config(m);
  nb::class_<TrainingTask, PythonTask>(m, "TrainingTask", "A pass of training.")
      .def("revoke", &TrainingTask::revoke, R"(Take the pass back, for a call that an exception has ended.

Whether it has not begun, is under way or is done: the saved forward passes and the step are as if it had never been. What it writes may be written all the same.)");
  Interface interface(m, "MoE_SFT_Interface", "What a layer that trains does beyond inference.");
  bind_forward(interface);
  bind_adapters(interface);
  bind_backward(interface);
  bind_training_layers(m, std::make_index_sequence<kMethods.size()>());
}

}  // namespace ktmoe::bindings
