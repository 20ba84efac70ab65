// Machine information: instruction sets, topology and measured limits.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings/tasks/gil.h"
#include "bindings/module.h"
#include "core/error.h"
#include "isa/isa.h"
#include "kernels/table.h"
#include "moe/limits.h"
#include "runtime/cpuinfer.h"
#include "runtime/topology.h"

namespace ktmoe::bindings {
namespace {

using Info = nb::typed<nb::dict, nb::str, nb::any>;

Info isa_info() {
  nb::list known, on_request, compiled, supported;
  for (Isa isa : kAllIsas) {
    const std::string name(isa_name(isa));
    known.append(name);
    if (is_on_request(isa)) on_request.append(name);
  }
  for (Isa isa : kernels::compiled_isas()) {
    const std::string name(isa_name(isa));
    compiled.append(name);
    if (supports(cpu_features(), isa)) supported.append(name);
  }
  nb::dict info;
  info["active"] = std::string(isa_name(kernels::active_table().isa));
  info["known"] = known;
  info["on_request"] = on_request;
  info["compiled"] = compiled;
  info["supported"] = supported;
  return info;
}

// Selects for any machine, given its processor features and a list of compiled instruction sets.
std::string select(const std::vector<std::string>& supported, const std::vector<std::string>& compiled,
                   const std::optional<std::string>& override_name) {
  CpuFeatures features;
  for (const std::string& name : supported) {
    switch (isa_from_name(name)) {
#define KT_ISA(enumerator, name, platform, choice) \
  case Isa::enumerator: features.name = true; break;
#include "isa/isas.inc"
#undef KT_ISA
    }
  }
  std::vector<Isa> isas;
  for (const std::string& name : compiled) isas.push_back(isa_from_name(name));
  return std::string(isa_name(select_isa(features, isas, override_name)));
}

Info topology() {
  const Topology t = Topology::read();
  nb::dict nodes;
  for (const auto& [node, cpus] : t.node_cpus) nodes[nb::int_(node)] = nb::cast(cpus);
  nb::dict info;
  info["cpus"] = nb::cast(t.cpus);
  info["node_cpus"] = nodes;
  info["cpu_quota"] = t.cpu_quota;
  return info;
}

Info limits(CPUInfer& engine, double seconds, const std::optional<std::string>& isa,
            const std::string& product) {
  if (!(seconds > 0) || seconds > 600)
    throw_invalid("seconds: got ", seconds, ", expected above 0, at most 600");
  const kernels::KernelTable* table = &kernels::active_table();
  if (isa) {
    const Isa wanted = isa_from_name(*isa);
    if (!supports(cpu_features(), wanted) || kernels::find_table(wanted) == nullptr)
      throw_runtime("isa: got '", isa_name(wanted), "', expected one that can run on this machine");
    table = kernels::find_table(wanted);
  }
  const bool is_integer = product == "int8";
  if (!is_integer && product != "bfloat16")
    throw_invalid("product: got '", product, "', expected 'bfloat16' or 'int8'");
  MachineLimits measured;
  {
    const GilRelease release;
    measured = measure_limits(engine.pool(), *table, seconds, is_integer);
  }
  nb::dict info;
  info["isa"] = std::string(isa_name(table->isa));
  info["threads"] = engine.pool().num_threads();
  info["read_bytes_per_s"] = measured.read_bytes_per_s;
  info["dot_flop_per_s"] = measured.dot_flop_per_s;
  info["step_flop_per_s"] = measured.step_flop_per_s;
  return info;
}

}  // namespace

void bind_machine(nb::module_& m) {
  m.def("isa_info", &isa_info,
        "Instruction sets, by name. Keys: 'active' (str), the one in use; 'known' (list of str), all, in "
        "rising order of preference; 'on_request' (list of str), those of them that are used only when "
        "KTMOE_ISA names them, since they are slow emulators for tests; 'compiled' (list of str), those of "
        "this build; 'supported' (list of str), those of the build that this machine can run.");
  m.def("select_isa", &select, nb::arg("supported"), nb::arg("compiled"),
        nb::arg("override_name").none() = nb::none(),
        "The instruction set that a machine whose processor has the supported ones would use.");
  m.def("topology", &topology,
        "The CPUs that this process may use. Keys: 'cpus' (list of int); 'node_cpus' (dict of int to list of "
        "int), those CPUs by NUMA node; 'cpu_quota' (int), CPUs' worth of time: their number, or fewer where "
        "a control group grants fewer.");
  m.def("measure_limits", &limits, nb::arg("engine"), nb::arg("seconds") = 0.3,
        nb::arg("isa").none() = nb::none(), nb::arg("product") = "bfloat16",
        "Measure the limits of all threads of an engine, for `seconds` (at most 600) each. Keys: 'isa' "
        "(str); 'threads' (int); 'read_bytes_per_s' (float); 'dot_flop_per_s' (float), of products, "
        "'bfloat16' or 'int8', with as few loads as possible; 'step_flop_per_s' (float), of the same "
        "products with operands loaded from the L1 cache, as kernels have them.");
}

}  // namespace ktmoe::bindings
