// A pass of a layer in CUDA streams, in Python: created once, run any number of times.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings/tasks/gil.h"
#include "bindings/module.h"
#include "bindings/streams/stream_session.h"
#include "core/error.h"

namespace ktmoe::bindings {
namespace {

class StreamPass {
 public:
  StreamPass(std::shared_ptr<CPUInfer> engine, const std::vector<nb::object>& inputs,
             const std::vector<std::pair<PythonTask*, nb::object>>& tasks,
             const std::vector<nb::object>& outputs, uint64_t num_deferred)
      : engine_(std::move(engine)) {
    for (const nb::object& output : outputs)
      outputs_.emplace_back(Array::read(output, "outputs")).expect_contiguous();
    for (const nb::object& input : inputs)
      inputs_.emplace_back(Array::write(input, "inputs")).expect_contiguous();
    if (num_deferred > tasks.size())
      throw_invalid("num_deferred: got ", num_deferred, ", expected at most ", tasks.size(), ", all tasks");
    const size_t num_immediate = tasks.size() - num_deferred;
    for (const auto& [task, result] : tasks) {
      if (task == nullptr) throw nb::type_error("tasks: got None, expected a Task");
      (immediate_.size() < num_immediate ? immediate_ : deferred_).push_back(stream_task(*task, result));
    }
  }

  void submit(uint64_t stream, const std::vector<uint64_t>& addresses, nb::object object) {
    const std::vector<DeviceCopy> inputs = copies_of(inputs_, addresses);
    release_done(*engine_);
    const auto kept = std::make_shared<nb::object>(std::move(object));  // destroyed with the GIL
    std::vector<StreamTask> all = immediate_;
    all.insert(all.end(), deferred_.begin(), deferred_.end());
    const GilRelease no_gil;  // the driver may wait for the stream
    session().copy_to_host(as_stream(stream), inputs);
    session().submit(as_stream(stream), engine_, all);
    session().keep_alive(as_stream(stream), kept, Destroyer::kLockHolder);
  }

  void sync(uint64_t stream, const std::vector<uint64_t>& addresses, nb::object object) {
    const std::vector<DeviceCopy> outputs = copies_of(outputs_, addresses);
    release_done(*engine_);
    const auto kept = std::make_shared<nb::object>(std::move(object));
    const GilRelease no_gil;
    session().sync(as_stream(stream), engine_, deferred_.size());
    copy_outputs(stream, outputs, kept);
  }

  void run(uint64_t stream, const std::vector<uint64_t>& from, const std::vector<uint64_t>& to,
           nb::object object) {
    const std::vector<DeviceCopy> inputs = copies_of(inputs_, from), outputs = copies_of(outputs_, to);
    release_done(*engine_);
    const auto kept = std::make_shared<nb::object>(std::move(object));
    const GilRelease no_gil;
    session().copy_to_host(as_stream(stream), inputs);
    session().run(as_stream(stream), engine_, immediate_, deferred_);
    copy_outputs(stream, outputs, kept);
  }

 private:
  using Destroyer = StreamSession::Destroyer;

  static std::vector<DeviceCopy> copies_of(const std::vector<Array>& arrays,
                                           const std::vector<uint64_t>& addresses) {
    if (addresses.size() != arrays.size())
      throw_invalid("addresses: got ", addresses.size(), ", expected ", arrays.size());
    std::vector<DeviceCopy> copies;
    for (size_t i = 0; i < addresses.size(); ++i)
      copies.push_back({addresses[i], arrays[i].as<void>(), arrays[i].bytes()});
    return copies;
  }

  static void copy_outputs(uint64_t stream, const std::vector<DeviceCopy>& outputs,
                           const std::shared_ptr<const void>& kept) {
    session().copy_to_device(as_stream(stream), outputs);
    session().keep_alive(as_stream(stream), kept, Destroyer::kLockHolder);
  }

  static StreamSession& session() { return StreamSession::of_process(); }

  std::shared_ptr<CPUInfer> engine_;
  std::vector<Array> inputs_, outputs_;
  std::vector<StreamTask> immediate_, deferred_;
};

}  // namespace

void bind_stream_pass(nb::module_& m) {
  nb::class_<StreamPass>(m, "StreamPass",
                         R"(A pass that streams run, any number of times, one after the other.

Parameters
----------
engine : CPUInfer
inputs : list of array
    Staging buffers for the inputs, in memory that must not move.
tasks : list of (Task, array)
    Tasks to submit, each with its output array, which becomes NaN when the task raises.
outputs : list of array
    Staging buffers of the outputs.
num_deferred : int
    The number of last tasks that are not waited for.)")
      .def(nb::init<std::shared_ptr<CPUInfer>, const std::vector<nb::object>&,
                    const std::vector<std::pair<PythonTask*, nb::object>>&, const std::vector<nb::object>&,
                    uint64_t>(),
           nb::arg("engine"), nb::arg("inputs"), nb::arg("tasks"), nb::arg("outputs"),
           nb::arg("num_deferred"))
      .def("submit", &StreamPass::submit, nb::arg("stream"), nb::arg("addresses"), nb::arg("kept").none(),
           "Let a stream copy the inputs from their addresses on a device and submit the tasks; keep an "
           "object alive until it has done so.")
      .def("sync", &StreamPass::sync, nb::arg("stream"), nb::arg("addresses"), nb::arg("kept").none(),
           "Let the stream wait for the tasks and copy the outputs to the device; keep an object alive until "
           "it has done so.")
      .def(
          "run", &StreamPass::run, nb::arg("stream"), nb::arg("addresses"), nb::arg("output_addresses"),
          nb::arg("kept").none(),
          "Both at once: the thread that the stream waits for runs the tasks, so no thread has to be woken.");
}

}  // namespace ktmoe::bindings
