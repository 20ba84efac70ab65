// Timelines of an engine in Python.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/tasks/trace.h"
#include "core/error.h"
#include "runtime/task_trace.h"

namespace ktmoe::bindings {
namespace {

// A recorded timeline, with names by number.
struct RecordedTrace {
  struct Span {
    uint32_t name, worker, task, unused = 0;
    int64_t layer, begin_ns, end_ns;
  };

  explicit RecordedTrace(const TaskTrace& trace) : num_dropped(trace.num_dropped()) {
    for (const TaskTrace::Span& span : trace.spans())
      spans.push_back({number(span.name), span.worker, span.task, 0, span.layer, span.begin_ns, span.end_ns});
  }

  uint32_t number(const std::string& name) {
    const auto found = std::find(names.begin(), names.end(), name);
    if (found != names.end()) return static_cast<uint32_t>(found - names.begin());
    names.push_back(name);
    return static_cast<uint32_t>(names.size() - 1);
  }

  std::vector<std::string> names;
  std::vector<Span> spans;
  uint64_t num_dropped;
};

}  // namespace

PythonTask begin_trace_task(const CPUInfer& engine) {
  return PythonTask([pool = engine.backend()] {
    if (pool->trace() != nullptr)
      throw_runtime("trace: got a second one, expected the end of the one that is recorded first");
    pool->set_trace(std::make_shared<TaskTrace>(pool->num_threads()));
  });
}

PythonTask end_trace_task(const CPUInfer& engine, const EndedTrace& ended) {
  return PythonTask([pool = engine.backend(), ended] { *ended = pool->take_trace(); });
}

nb::object recorded_trace(const std::shared_ptr<const TaskTrace>& trace) {
  if (trace == nullptr) throw_runtime("trace: got an end, expected a beginning before it");
  return nb::cast(RecordedTrace(*trace));
}

void bind_recorded_trace(nb::module_& m) {
  nb::class_<RecordedTrace>(m, "RecordedTrace",
                            R"(What an engine has recorded between `begin_trace` and `end_trace`.

Attributes
----------
names : list of str
    Of the phases of passes.
spans : bytes
    Records of four uint32 (the number of a name; the worker, or 2^32 - 1 for a phase as a whole; the task; 0) and
    three int64 (layer; begin and end in nanoseconds of a steady clock).
num_dropped : int
    Spans that there was no room for.)")
      .def_ro("names", &RecordedTrace::names)
      .def_prop_ro("spans",
                   [](const RecordedTrace& self) {
                     return nb::bytes(self.spans.data(), self.spans.size() * sizeof(RecordedTrace::Span));
                   })
      .def_ro("num_dropped", &RecordedTrace::num_dropped);
}

}  // namespace ktmoe::bindings
