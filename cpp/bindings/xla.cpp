// The handlers of XLA's calls in Python, as JAX registers them, and the layers that they may call.
#include "xla/handlers.h"

#include <nanobind/stl/shared_ptr.h>

#include <utility>

#include "bindings/arrays.h"
#include "bindings/module.h"
#include "xla/layers.h"

namespace ktmoe::bindings {
namespace {

nb::capsule capsule(xla::Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

int32_t add_layer(std::shared_ptr<CPUInfer> engine, std::shared_ptr<MoE_Interface> layer,
                  nb::handle skip_experts) {
  auto called = std::make_shared<xla::CalledLayer>();
  called->engine = std::move(engine);
  called->training = std::dynamic_pointer_cast<MoE_SFT_Interface>(layer);
  if (!skip_experts.is_none()) {
    const Array skip = Array::read(skip_experts, "skip_experts");
    skip.expect({DType::kBool}, {layer->config().expert_num}).expect_contiguous();
    called->skip_experts.assign(skip.as<uint8_t>(), skip.as<uint8_t>() + skip.size());
  }
  called->layer = std::move(layer);
  return xla::Layers::all().add(std::move(called));
}

nb::typed<nb::dict, nb::str, nb::int_> last_addresses() {
  const xla::Addresses a = xla::last_addresses();
  nb::typed<nb::dict, nb::str, nb::int_> result;
  const auto set = [&](const char* name, const void* at) { result[name] = reinterpret_cast<uintptr_t>(at); };
  set("hidden_states", a.hidden_states), set("out", a.out);
  set("grad_output", a.grad_output), set("grad_input", a.grad_input);
  return result;
}

}  // namespace

void bind_xla(nb::module_& m) {
  m.def(
      "handlers",
      [] {
        nb::typed<nb::dict, nb::str, nb::capsule> handlers;
        handlers["forward"] = capsule(xla::forward);
        handlers["forward_sft"] = capsule(xla::forward_sft);
        handlers["forward_saved"] = capsule(xla::forward_saved);
        handlers["backward"] = capsule(xla::backward);
        return handlers;
      },
      "The functions to register with JAX, by name, as capsules.");
  m.def("add_layer", &add_layer, nb::arg("engine"), nb::arg("layer"), nb::arg("skip_experts").none(),
        R"(Let programs call a layer.

Parameters
----------
engine : CPUInfer
layer : MoE_Interface
skip_experts : array of bool [E], or None
    Copied.

Returns
-------
int
    The layer's number, which calls have as their first argument.)");
  m.def(
      "remove_layer", [](int32_t number) { xla::Layers::all().remove(number); }, nb::arg("number"),
      "Let the layer go; later calls of it fail.");
  m.def("last_addresses", &last_addresses,
        "Where the last call has found and put its arrays: whether anything was copied on the way to it.");
}

}  // namespace ktmoe::bindings
