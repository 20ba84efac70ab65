// The parts that the extension module is made of.
#pragma once

#include <nanobind/nanobind.h>

namespace ktmoe::bindings {

namespace nb = nanobind;

void bind_call_lock(nb::module_& m);
void bind_combine_rows(nb::module_& m);
void bind_cuda(nb::module_& m);
void bind_deferred_pass(nb::module_& m);  // after bind_moe
void bind_engine(nb::module_& m);
void bind_host_array(nb::module_& m);
void bind_machine(nb::module_& m);
void bind_moe(nb::module_& m);
void bind_numbered_pass(nb::module_& m);  // after bind_sft
void bind_quantize(nb::module_& m);
void bind_registry(nb::module_& m);
void bind_sft(nb::module_& m);  // after bind_moe
void bind_stream_pass(nb::module_& m);
void bind_xla(nb::module_& m);  // after bind_sft

}  // namespace ktmoe::bindings
