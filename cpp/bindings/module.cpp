// ktmoe_np.kt_kernel_ext: the C++ core as Python sees it.
#include "bindings/module.h"

#include "bindings/convert/arrays.h"
#include "bindings/tasks/gil.h"
#include "kernels/table.h"

NB_MODULE(kt_kernel_ext, m) {
  using namespace ktmoe::bindings;
  m.doc() = "The C++ core of ktmoe_np: engine and expert layers on arrays, without a copy.";
  nanobind::set_leak_warnings(
      false);                      // the library prints nothing, not even in a forked child that just ends
  ktmoe::kernels::active_table();  // an unknown or unsupported KTMOE_ISA fails here, at import
  init_arrays();
  init_gil();
  bind_call_lock(m);
  bind_engine(m);
  bind_host_array(m);
  nanobind::module_ cuda =
      m.def_submodule("cuda", "What of CUDA is used: streams that call the engine, copies, locked pages.");
  bind_cuda(cuda);
  bind_machine(m);
  bind_registry(m);
  bind_quantize(m);
  nanobind::module_ moe = m.def_submodule("moe", "Expert layers, one class per method.");
  bind_moe(moe);
  bind_sft(moe);
  bind_numbered_pass(moe);
  bind_combine_rows(moe);
  bind_deferred_pass(moe);
  nanobind::module_ xla = m.def_submodule("xla", "The functions that JAX programs call.");
  bind_xla(xla);
}
