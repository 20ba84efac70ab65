#include "bindings/layers/training_config.h"

#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <utility>

namespace ktmoe::bindings {
namespace {

using Class = nb::class_<SFTConfig, GeneralMOEConfig>;

const char* const kDoc = R"(The shape of an expert layer that trains, and what its adapters begin as.

Parameters
----------
expert_num, num_experts_per_tok, hidden_size, intermediate_size, layer_idx, pool
    As in MOEConfig.
lora_rank, lora_alpha, gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b
    See the attributes.

Attributes
----------
lora_rank : int
    R; 0 for no adapters.
lora_alpha : float
    The adapters are scaled by lora_alpha / R.
gate_lora_a, up_lora_a : array, optional
    float32 or bfloat16 [E, R, H]: initial adapters of a layer, None for zeros. Checked, and copied as bfloat16,
    when the layer is created; later changes do not affect it.
gate_lora_b, up_lora_b : array, optional
    [E, I, R].
down_lora_a, down_lora_b : array, optional
    [E, R, I] and [E, H, R].
lora_dropout : float
    Probability that an element of an adapter's input is dropped in a saving forward pass.
seed : int
    Of the dropout masks.
max_cache_depth : int
    Forward passes that may wait for their backward pass.
recompute : bool
    Keep input and routing only, and repeat the forward pass in the backward pass.
cache_float32 : bool
    Keep gate and up in float32 rather than bfloat16.)";

void init_config(SFTConfig* self, int64_t experts, int64_t per_token, int64_t hidden, int64_t intermediate,
                 int64_t layer_idx, std::shared_ptr<WorkerPool> pool, int64_t lora_rank, double lora_alpha,
                 nb::object gate_a, nb::object gate_b, nb::object up_a, nb::object up_b, nb::object down_a,
                 nb::object down_b) {
  MOESFTConfig config{{experts, per_token, hidden, intermediate, layer_idx, {}, std::move(pool)}};
  config.lora_rank = lora_rank, config.lora_alpha = lora_alpha;
  new (self) SFTConfig{std::move(config),
                       {std::move(gate_a), std::move(gate_b), std::move(up_a), std::move(up_b),
                        std::move(down_a), std::move(down_b)}};
}

// The garbage collector follows the arrays: one of a class with attributes may refer to its config.
int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  for (const nb::object& array : nb::inst_ptr<SFTConfig>(self)->lora) Py_VISIT(array.ptr());
  return 0;
}
int clear(PyObject* self) {
  for (nb::object& array : nb::inst_ptr<SFTConfig>(self)->lora) array = nb::none();
  return 0;
}
PyType_Slot kSlots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
                        {Py_tp_clear, reinterpret_cast<void*>(&clear)},
                        {0, nullptr}};

void bind_init(Class& config) {
  const auto none = nb::none();
  const MOESFTConfig defaults;
  config.def("__init__", &init_config, nb::arg("expert_num") = 0, nb::arg("num_experts_per_tok") = 0,
             nb::arg("hidden_size") = 0, nb::arg("intermediate_size") = 0, nb::arg("layer_idx") = 0,
             nb::arg("pool").none() = none, nb::kw_only(), nb::arg("lora_rank") = defaults.lora_rank,
             nb::arg("lora_alpha") = defaults.lora_alpha, nb::arg("gate_lora_a").none() = none,
             nb::arg("gate_lora_b").none() = none, nb::arg("up_lora_a").none() = none,
             nb::arg("up_lora_b").none() = none, nb::arg("down_lora_a").none() = none,
             nb::arg("down_lora_b").none() = none);
}

void bind_lora(Class& config) {
  for (size_t i = 0; i < kNumLora; ++i)
    config.def_prop_rw(
        lora_name({}, i), [i](const SFTConfig& c) { return c.lora[i]; },
        [i](SFTConfig& c, nb::object array) { c.lora[i] = std::move(array); },
        nb::for_setter(nb::arg("value").none()), "What the adapters of a layer begin as; None for zeros.");
}

}  // namespace

LoraHandles SFTConfig::lora_handles() const {
  LoraHandles handles;
  std::copy(lora.begin(), lora.end(), handles.begin());
  return handles;
}

void bind_sft_config(nb::module_& m) {
  Class config(m, "MOESFTConfig", nb::type_slots(kSlots), kDoc);
  bind_init(config);
  bind_lora(config);
  config.def_rw("lora_rank", &SFTConfig::lora_rank)
      .def_rw("lora_alpha", &SFTConfig::lora_alpha)
      .def_rw("lora_dropout", &SFTConfig::lora_dropout)
      .def_rw("seed", &SFTConfig::seed)
      .def_rw("max_cache_depth", &SFTConfig::max_cache_depth)
      .def_rw("recompute", &SFTConfig::recompute)
      .def_rw("cache_float32", &SFTConfig::cache_float32);
}

}  // namespace ktmoe::bindings
