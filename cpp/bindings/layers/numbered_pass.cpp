// Passes with the caller's adapters in Python, for callers that go back through them in any order.
#include "sft/numbered_pass.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cstddef>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/convert/gradient_arrays.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "core/error.h"

namespace ktmoe::bindings {
namespace {

using TrainedLayer = std::shared_ptr<MoE_SFT_Interface>;
using Matrices = nb::typed<nb::tuple, nb::object, nb::ellipsis>;

LoraHandles six_of(const Matrices& matrices, const char* name) {
  if (matrices.size() != kNumLora)
    throw_invalid(name, ": got ", matrices.size(), " matrices, expected ", kNumLora);
  LoraHandles handles;
  for (size_t i = 0; i < kNumLora; ++i) handles[i] = matrices[i];
  return handles;
}

PythonTask numbered_forward_task(TrainedLayer layer, nb::handle hidden_states, nb::handle topk_ids,
                                 nb::handle topk_weights, nb::handle out, const Matrices& lora,
                                 uint32_t number, nb::handle skip_experts,
                                 const std::optional<std::string>& activation_dtype) {
  ForwardArrays forward(layer->config(), hidden_states, topk_ids, topk_weights, out, skip_experts);
  forward.set_activation_dtype(activation_dtype_of(*layer, activation_dtype));
  const LoraSources sources = read_lora(layer->sft_config(), six_of(lora, "lora"), *forward.arrays());
  const auto arrays = forward.arrays();
  return PythonTask([layer, forward = std::move(forward), sources,
                     number] { forward_numbered(*layer, sources, forward.args(), number); },
                    arrays);
}

PythonTask numbered_backward_task(TrainedLayer layer, nb::handle hidden_states, nb::handle topk_ids,
                                  nb::handle topk_weights, const Matrices& lora, uint32_t number,
                                  nb::handle grad_output, nb::handle grad_input, nb::handle grad_weights,
                                  const Matrices& grad_lora, nb::handle skip_experts,
                                  const std::optional<std::string>& activation_dtype) {
  GradientArrays gradients(layer->sft_config(), grad_output, grad_input, grad_weights);
  gradients.write_lora(six_of(grad_lora, "grad_lora"));
  // Its output, here the place of another array, is not written: a repeated pass has one of its own.
  ForwardArrays forward(layer->config(), hidden_states, topk_ids, topk_weights, grad_input, skip_experts);
  forward.set_activation_dtype(activation_dtype_of(*layer, activation_dtype));
  const auto arrays = forward.arrays();
  const LoraSources sources = read_lora(layer->sft_config(), six_of(lora, "lora"), *arrays);
  const BackwardArgs args = gradients.args();
  std::vector<std::span<std::byte>> written;
  for (Array& array : gradients.take()) {
    if (array.name() != std::string_view("grad_output"))
      written.emplace_back(array.as<std::byte>(), array.bytes());
    arrays->push_back(std::move(array));
  }
  return PythonTask(
      [layer, forward = std::move(forward), sources, number, args, written] {
        try {
          backward_numbered(*layer, sources, forward.args(), number, args);
        } catch (...) {  // a stream copies them all the same: NaN, as the results of its failed tasks
          for (const std::span<std::byte> bytes : written) std::memset(bytes.data(), 0xFF, bytes.size());
          throw;
        }
      },
      arrays);
}

}  // namespace

void bind_numbered_pass(nb::module_& m) {
  const auto none = nb::none();
  m.def("next_pass_number", &next_pass_number, "A number for a pass that is saved; never 0.");
  m.def("numbered_forward_task", &numbered_forward_task, nb::arg("layer"), nb::arg("hidden_states").none(),
        nb::arg("topk_ids").none(), nb::arg("topk_weights").none(), nb::arg("out").none(), nb::arg("lora"),
        nb::arg("number"), nb::kw_only(), nb::arg("skip_experts").none() = none,
        nb::arg("activation_dtype").none() = none,
        R"(Make the task of a forward pass with adapters of the caller.

Parameters
----------
layer : MoE_SFT_Interface
hidden_states, topk_ids, topk_weights, out, skip_experts, activation_dtype
    As in forward_task.
lora : tuple of six arrays or None
    The adapters, as in update_lora_weights_task; those of the layer from then on.
number : int
    Above 0: the pass is saved under it, in the place of all that were saved before.

Returns
-------
Task)");
  m.def("numbered_backward_task", &numbered_backward_task, nb::arg("layer"), nb::arg("hidden_states").none(),
        nb::arg("topk_ids").none(), nb::arg("topk_weights").none(), nb::arg("lora"), nb::arg("number"),
        nb::arg("grad_output").none(), nb::arg("grad_input").none(), nb::arg("grad_weights").none(),
        nb::arg("grad_lora"), nb::kw_only(), nb::arg("skip_experts").none() = none,
        nb::arg("activation_dtype").none() = none,
        R"(Make the task of the backward pass of a forward pass that had a number.

The forward pass is repeated where it is not the last that the layer has saved.

Parameters
----------
layer, hidden_states, topk_ids, topk_weights, lora, number, skip_experts, activation_dtype
    Those of numbered_forward_task.
grad_output, grad_input, grad_weights
    As in backward_task.
grad_lora : tuple of six arrays or None
    float32 gradients of the adapters, written. None: not computed.

Returns
-------
Task
    When it fails, all gradients are NaN.)");
}

}  // namespace ktmoe::bindings
