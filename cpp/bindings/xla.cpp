// The handlers of XLA's calls in Python, as JAX registers them, and the layers that they may call.
#include "xla/handlers.h"

#include <nanobind/stl/shared_ptr.h>

#include <utility>

#include "bindings/arrays.h"
#include "bindings/module.h"
#include "core/error.h"
#include "xla/cuda_calls.h"
#include "xla/layers.h"

namespace ktmoe::bindings {
namespace {

nb::capsule capsule(xla::Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

using Handlers = nb::typed<nb::dict, nb::str, nb::capsule>;

Handlers handlers() {
  Handlers on_host;
  on_host["forward"] = capsule(xla::forward);
  on_host["forward_sft"] = capsule(xla::forward_sft);
  on_host["forward_saved"] = capsule(xla::forward_saved);
  on_host["backward"] = capsule(xla::backward);
  on_host["forward_deferred"] = capsule(xla::forward_deferred);
  on_host["drain_deferred"] = capsule(xla::drain_deferred);
  return on_host;
}

Handlers cuda_handlers() {
  Handlers on_cuda;
  on_cuda["forward"] = capsule(xla::on_cuda::forward);
  on_cuda["forward_sft"] = capsule(xla::on_cuda::forward_sft);
  on_cuda["forward_saved"] = capsule(xla::on_cuda::forward_saved);
  on_cuda["backward"] = capsule(xla::on_cuda::backward);
  on_cuda["forward_deferred"] = capsule(xla::on_cuda::forward_deferred);
  on_cuda["drain_deferred"] = capsule(xla::on_cuda::drain_deferred);
  return on_cuda;
}

int32_t add_layer(std::shared_ptr<CPUInfer> engine, std::shared_ptr<MoE_Interface> layer,
                  nb::handle skip_experts, int64_t num_deferred) {
  const int64_t slots = layer->config().num_experts_per_tok;
  if (num_deferred < 0 || num_deferred > slots)
    throw_invalid("num_deferred: got ", num_deferred, ", expected 0 to ", slots);
  auto called = std::make_shared<xla::CalledLayer>();
  called->num_deferred = static_cast<uint32_t>(num_deferred);
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
  m.def("handlers", &handlers, "The functions to register with JAX for the CPU, by name, as capsules.");
  m.def("cuda_handlers", &cuda_handlers, "The same for GPUs.");
  m.def("raise_error", &xla::rethrow_error, "Raise the first error of calls on a GPU since the last time.");
  m.def("add_layer", &add_layer, nb::arg("engine"), nb::arg("layer"), nb::arg("skip_experts").none(),
        nb::arg("num_deferred") = 0,
        R"(Let programs call a layer.

Parameters
----------
engine : CPUInfer
layer : MoE_Interface
skip_experts : array of bool [E], or None
    Copied.
num_deferred : int
    Experts of each token that calls defer which do so.

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
