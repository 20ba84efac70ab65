// The engine in Python: WorkerPoolConfig, WorkerPool, CPUInfer, Task.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bindings/convert/arrays.h"
#include "bindings/tasks/gil.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "bindings/tasks/trace.h"
#include "bindings/streams/stream_session.h"
#include "core/error.h"
#include "runtime/cpuinfer.h"
#include "runtime/parallel_copy.h"
#include "runtime/run_in_turn.h"

namespace ktmoe::bindings {
namespace {

// Finished tasks have Python references: they are destroyed here, with the GIL.
void release_finished(CPUInfer& engine) { engine.take_finished(); }

// Repeats a wait of limited time, so that Ctrl-C works while another thread does the work.
template <class WaitFor>
void wait_in_slices(CPUInfer& engine, WaitFor&& wait_for) {
  constexpr std::chrono::milliseconds kSlice{50};
  struct Release {
    CPUInfer& engine;
    ~Release() { release_finished(engine); }
  } release{engine};
  for (bool done = false; !done;) {
    {
      const GilRelease no_gil;
      done = wait_for(kSlice);
    }
    if (PyErr_CheckSignals() != 0) nb::raise_python_error();
  }
}

void wait_for_task(CPUInfer& engine, const Ticket& ticket) {
  wait_in_slices(engine, [&](auto slice) { return engine.wait_for(ticket, slice); });
}

void sync(CPUInfer& engine, uint64_t allow_n_pending) {
  release_done(engine);
  const uint64_t submitted = engine.num_submitted(), last = submitted - std::min(submitted, allow_n_pending);
  wait_in_slices(engine, [&](auto slice) { return engine.sync_for(last, slice); });
  StreamSession::of_process().rethrow();
}

Ticket submit(CPUInfer& engine, PythonTask& task) {
  release_finished(engine);
  return engine.submit(task.take());
}

void run(CPUInfer& engine, PythonTask& task) {
  wait_for_task(engine, engine.submit(task.take(), /*wake=*/false));
}

void run_all(CPUInfer& engine, const std::vector<PythonTask*>& tasks) {
  const auto take = [&](size_t i) -> std::unique_ptr<Task> {
    if (tasks[i] == nullptr) throw nb::type_error("tasks: got None, expected a Task");
    return tasks[i]->take();
  };
  run_in_turn(engine, tasks.size(), take, [&](const Ticket& ticket) { wait_for_task(engine, ticket); });
}

void copy(CPUInfer& engine, nb::handle source, nb::handle to) {
  const auto from = std::make_shared<Array>(Array::read(source, "source"));
  const auto target = std::make_shared<Array>(Array::write(to, "to"));
  from->expect_contiguous(), target->expect_contiguous().expect_disjoint(*from);
  const size_t bytes = from->bytes();
  if (target->bytes() != bytes) throw_invalid("to: got ", target->bytes(), " bytes, expected ", bytes);
  PythonTask task([from, target, bytes, pool = engine.backend()] {
    parallel_copy(*pool, from->as<const std::byte>(), target->as<std::byte>(), bytes);
  });
  run(engine, task);
}

WorkerPoolConfig make_config(int subpool_count, std::vector<int> numa_map, std::vector<int> thread_count) {
  WorkerPoolConfig config;
  config.subpool_count = subpool_count;
  config.subpool_numa_map = std::move(numa_map);
  config.subpool_thread_count = std::move(thread_count);
  return config;
}

std::string list_text(const std::vector<int>& values) {
  std::string text = "[";
  for (const int value : values) text += str_cat(text.size() > 1 ? ", " : "", value);
  return text + "]";
}

std::string config_repr(const WorkerPoolConfig& config) {
  return str_cat("WorkerPoolConfig(subpool_count=", config.subpool_count,
                 ", subpool_numa_map=", list_text(config.subpool_numa_map),
                 ", subpool_thread_count=", list_text(config.subpool_thread_count), ")");
}

std::string pool_summary(const WorkerPool& pool) {
  return str_cat(pool.num_threads(), " threads in ", pool.num_subpools(), " sub-pools, NUMA nodes ",
                 list_text(pool.config().subpool_numa_map));
}

std::string engine_repr(const CPUInfer& engine) {
  return str_cat("<CPUInfer ", pool_summary(*engine.backend()), ", ", engine.num_completed(), " of ",
                 engine.num_submitted(), " tasks completed>");
}

void bind_streams(nb::class_<CPUInfer>& engine) {
  engine
      .def(
          "submit_with_cuda_stream",
          [](std::shared_ptr<CPUInfer> engine, uint64_t stream, PythonTask& task, nb::handle result) {
            release_done(*engine);
            const std::vector<StreamTask> tasks = {stream_task(task, result)};  // destroyed with the GIL
            const GilRelease no_gil;  // the driver may wait for the stream
            StreamSession::of_process().submit(as_stream(stream), engine, tasks);
          },
          nb::arg("stream"), nb::arg("task"), nb::arg("result").none() = nb::none(),
          R"(Submit a task when a CUDA stream reaches this point; returns at once.

In a stream that is being captured, the graph submits the task at every replay; the task and its arrays are then kept alive permanently.

Parameters
----------
stream : int
    The stream's handle; 0 is the default stream.
task : Task
result : array of floats, optional
    The output of the task, kept alive by it: NaN when the task raises, as the stream cannot raise.

Raises
------
RuntimeError
    There is no CUDA driver, or it refuses.)")
      .def(
          "sync_with_cuda_stream",
          [](std::shared_ptr<CPUInfer> engine, uint64_t stream, uint64_t allow_n_pending) {
            release_done(*engine);
            {
              const GilRelease no_gil;
              StreamSession::of_process().sync(as_stream(stream), engine, allow_n_pending);
            }
            StreamSession::of_process().rethrow();
          },
          nb::arg("stream"), nb::arg("allow_n_pending") = 0,
          R"(Let a CUDA stream wait, at this point, until at most `allow_n_pending` tasks are unfinished; returns at once.

Raises the exceptions of tasks that streams have submitted, after the wait is in the stream; so does `sync`.)");
}

void begin_trace(CPUInfer& engine) {
  PythonTask task = begin_trace_task(engine);
  run(engine, task);
}

nb::object end_trace(CPUInfer& engine) {
  // Shared with the task, which an interrupt of this wait leaves in the queue.
  const auto ended = std::make_shared<EndedTrace::element_type>();
  PythonTask task = end_trace_task(engine, ended);
  run(engine, task);
  return recorded_trace(*ended);
}

void bind_trace(nb::class_<CPUInfer>& engine) {
  engine
      .def("begin_trace", &begin_trace,
           R"(Record from now on which worker computes what, from when to when.

Raises
------
RuntimeError
    A timeline is being recorded.)")
      .def("end_trace", &end_trace, nb::sig("def end_trace(self) -> RecordedTrace"),
           R"(End the recording that `begin_trace` has begun.

Returns
-------
RecordedTrace

Raises
------
RuntimeError
    None is being recorded.)");
}

void bind_pool(nb::module_& m) {
  nb::class_<WorkerPoolConfig>(m, "WorkerPoolConfig",
                               R"(Threads of an engine, in sub-pools that stay on a NUMA node.

Parameters
----------
subpool_count : int
    Number of sub-pools. Several may be on one node.
subpool_numa_map : list of int
    The NUMA node of each sub-pool.
subpool_thread_count : list of int
    The number of threads of each sub-pool, the calling thread included.)")
      .def(
          "__init__",
          [](WorkerPoolConfig* self, int count, std::vector<int> numa_map, std::vector<int> threads) {
            new (self) WorkerPoolConfig(make_config(count, std::move(numa_map), std::move(threads)));
          },
          nb::arg("subpool_count"), nb::arg("subpool_numa_map"), nb::arg("subpool_thread_count"))
      .def_static(
          "defaults", [] { return WorkerPoolConfig::defaults(Topology::read()); },
          "One sub-pool per node with CPUs that this process may use, one thread per CPU.")
      .def_rw("subpool_count", &WorkerPoolConfig::subpool_count)
      .def_rw("subpool_numa_map", &WorkerPoolConfig::subpool_numa_map)
      .def_rw("subpool_thread_count", &WorkerPoolConfig::subpool_thread_count)
      .def("__repr__", &config_repr);

  nb::class_<WorkerPool>(m, "WorkerPool", "The threads of an engine; created by CPUInfer, passed to layers.")
      .def_prop_ro("num_threads", [](const WorkerPool& pool) { return pool.num_threads(); })
      .def_prop_ro("num_subpools", &WorkerPool::num_subpools)
      .def_prop_ro("config", &WorkerPool::config, nb::rv_policy::copy)
      .def("__repr__",
           [](const WorkerPool& pool) { return str_cat("<WorkerPool ", pool_summary(pool), ">"); });
}

}  // namespace

void bind_engine(nb::module_& m) {
  bind_pool(m);
  nb::class_<PythonTask>(m, "Task", "Work for an engine, created by a layer; it can be submitted once.",
                         nb::type_slots(PythonTask::slots));
  nb::class_<Ticket>(m, "Ticket", R"(A submitted task, to wait for.

As long as it lives, `CPUInfer.wait` raises the exception of a failed task, even if another caller has got it.)")
      .def_prop_ro("number", &Ticket::number, "1, 2, 3 ... in the order of execution.")
      .def("__repr__", [](const Ticket& ticket) { return str_cat("Ticket(", ticket.number(), ")"); });

  nb::class_<CPUInfer> engine(
      m, "CPUInfer",
      R"(The engine: threads, and a queue of tasks that run in the order of submission.

Parameters
----------
config : WorkerPoolConfig or int
    The threads, or just their number.

Raises
------
ValueError
    Impossible threads or sub-pools: the message names the field, and the existing nodes.)");
  bind_streams(engine);
  bind_recorded_trace(m);
  bind_trace(engine);
  engine.def(nb::init<WorkerPoolConfig>(), nb::arg("config"))
      .def(nb::init<int>(), nb::arg("num_threads"))
      .def("__repr__", &engine_repr)
      .def_prop_ro("backend_", &CPUInfer::backend, "The threads, as layers take them in their config.")
      .def("submit", &submit, nb::arg("task"), "Queue a task and return its ticket; does not wait.")
      .def("sync", &sync, nb::arg("allow_n_pending") = 0,
           R"(Wait until at most `allow_n_pending` of the submitted tasks are unfinished.

Raises
------
Exception
    The first one that a task waited for has raised. The engine stays usable.)")
      .def("wait", &wait_for_task, nb::arg("ticket"),
           R"(Wait for the task with that ticket.

Raises
------
Exception
    The exception of the task, at every call.
ValueError
    The ticket of another engine.)")
      .def("run", &run, nb::arg("task"), "Submit a task and wait for it, without waking another thread.")
      .def("run", &run_all, nb::arg("tasks"),
           "Run one task after the other. An exception, of a task or of a signal handler, ends this.")
      .def("copy", &copy, nb::arg("source"), nb::arg("to"),
           "Copy an array to another of the same size in bytes, with all threads, after the tasks submitted "
           "before.")
      .def(
          "shutdown",
          [](CPUInfer& engine) {
            {
              const GilRelease release;
              engine.shutdown();
            }
            release_finished(engine);
          },
          "Finish the queued tasks and end the threads. May be called again.")
      .def_prop_ro("num_submitted", &CPUInfer::num_submitted)
      .def_prop_ro("num_completed", &CPUInfer::num_completed);
}

}  // namespace ktmoe::bindings
