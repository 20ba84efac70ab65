// What layers count and measure, in Python.
#include "moe/layer/pass_stats.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <string>

#include "bindings/layers/pass_stats.h"
#include "bindings/tasks/gil.h"
#include "moe/layer/interface.h"

namespace ktmoe::bindings {
namespace {

std::map<std::string, int64_t> phase_ns(const PassStats& stats) {
  std::map<std::string, int64_t> found;
  for (size_t i = 0; i < kNumPhases; ++i)
    if (stats.phase_ns[i] > 0) found[kPhaseNames[i]] = stats.phase_ns[i];
  return found;
}

}  // namespace

void bind_pass_stats(nb::module_& m) {
  nb::class_<PassStats>(m, "PassStats", "What a layer has counted and measured; see `ktmoe_np.LayerStats`.")
      .def_ro("forward_calls", &PassStats::forward_calls)
      .def_ro("backward_calls", &PassStats::backward_calls)
      .def_ro("tokens", &PassStats::tokens)
      .def_ro("rows", &PassStats::rows)
      .def_ro("expert_readings", &PassStats::expert_readings)
      .def_ro("nanoseconds", &PassStats::nanoseconds)
      .def_prop_ro("phase_ns", &phase_ns)
      .def_ro("expert_tokens", &PassStats::expert_tokens);
}

void bind_stats(nb::class_<MoE_Interface>& layer) {
  layer
      .def(
          "collect_stats",
          [](MoE_Interface& self, bool on) {
            const GilRelease no_gil;  // a pass may be running
            self.collect_stats(on);
          },
          nb::arg("on"), "Start, at zero, or stop to count and measure passes.")
      .def_prop_ro("collects_stats",
                   [](const MoE_Interface& self) {
                     const GilRelease no_gil;
                     return self.collects_stats();
                   })
      .def(
          "stats",
          [](MoE_Interface& self, bool reset) {
            const GilRelease no_gil;
            return self.stats(reset);
          },
          nb::arg("reset") = false,
          "Those of the passes since `collect_stats` or a reset; RuntimeError when none are collected.");
}

}  // namespace ktmoe::bindings
