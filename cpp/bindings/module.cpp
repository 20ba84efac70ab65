// ktmoe_np.kt_kernel_ext: the C++ core as Python sees it.
#include "bindings/module.h"

#include "bindings/arrays.h"
#include "kernels/table.h"

NB_MODULE(kt_kernel_ext, m) {
  using namespace ktmoe::bindings;
  m.doc() = "The C++ core of ktmoe_np: engine and expert layers on arrays, without a copy.";
  ktmoe::kernels::active_table();  // an unknown or unsupported KTMOE_ISA fails here, at import
  init_arrays();
  bind_engine(m);
  bind_machine(m);
  nanobind::module_ moe = m.def_submodule("moe", "Expert layers, a class a method.");
  bind_moe(moe);
}
