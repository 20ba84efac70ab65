// The XLA handlers in Python, for JAX to register, and the layers that they may call.
#include "xla/handlers.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <utility>

#include "bindings/convert/forward_arrays.h"
#include "bindings/module.h"
#include "core/error.h"
#include "xla/layers.h"

namespace ktmoe::bindings {
namespace {

nb::capsule capsule(xla::Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

// The handlers of a platform, by name.
nb::typed<nb::dict, nb::str, nb::capsule> handlers_of(xla::Handler* xla::PlatformHandlers::* platform) {
  nb::typed<nb::dict, nb::str, nb::capsule> handlers;
  for (const xla::PlatformHandlers& each : xla::all_handlers()) handlers[each.name] = capsule(each.*platform);
  return handlers;
}

int32_t add_layer(std::shared_ptr<CPUInfer> engine, std::shared_ptr<MoE_Interface> layer,
                  nb::handle skip_experts, int64_t num_deferred, int64_t chunk_size,
                  const std::optional<std::string>& activation_dtype) {
  const int64_t slots = layer->config().num_experts_per_tok;
  if (num_deferred < 0 || num_deferred > slots)
    throw_invalid("num_deferred: got ", num_deferred, ", expected 0 to ", slots);
  if (chunk_size < 0 || chunk_size > UINT32_MAX)
    throw_invalid("chunk_size: got ", chunk_size, ", expected 0 to ", UINT32_MAX);
  auto called = std::make_shared<xla::CalledLayer>();
  called->activation_dtype = activation_dtype_of(*layer, activation_dtype);
  called->chunk_size = static_cast<uint32_t>(chunk_size);
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

}  // namespace

void bind_xla(nb::module_& m) {
  m.def(
      "handlers", [] { return handlers_of(&xla::PlatformHandlers::on_host); },
      "The functions to register with JAX for the CPU, by name, as capsules.");
  m.def("cuda_handlers", [] { return handlers_of(&xla::PlatformHandlers::on_cuda); }, "The same for GPUs.");
  m.def("add_layer", &add_layer, nb::arg("engine"), nb::arg("layer"), nb::arg("skip_experts").none(),
        nb::arg("num_deferred") = 0, nb::arg("chunk_size") = 0,
        nb::arg("activation_dtype").none() = nb::none(),
        R"(Let programs call a layer.

Parameters
----------
engine : CPUInfer
layer : MoE_Interface
skip_experts : array of bool [E], or None
    Copied.
num_deferred : int
    Experts of each token that calls defer which do so.
chunk_size : int
    Tokens that a forward pass for inference computes at a time, at most; 0: all.
activation_dtype : {"bfloat16", "int8"}, optional
    What products take activations in; None for the config's.

Returns
-------
int
    The layer's number, which calls have as their first argument.)");
  m.def(
      "remove_layer", [](int32_t number) { xla::Layers::all().remove(number); }, nb::arg("number"),
      "Let the layer go; later calls of it fail.");
}

}  // namespace ktmoe::bindings
