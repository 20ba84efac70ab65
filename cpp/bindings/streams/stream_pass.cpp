// A pass of a layer in CUDA streams, in Python: made once, to be done any number of times.
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
             const std::vector<std::pair<PythonTask*, nb::object>>& tasks, nb::handle output,
             uint64_t num_deferred)
      : engine_(std::move(engine)), output_(Array::read(output, "output")) {
    output_.expect_contiguous();
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
    check(addresses);
    settle(*engine_);
    const auto held = std::make_shared<nb::object>(std::move(object));  // let go of with the GIL
    std::vector<StreamTask> all = immediate_;
    all.insert(all.end(), deferred_.begin(), deferred_.end());
    const GilRelease no_gil;  // the driver may wait for the stream
    copy_down(stream, addresses);
    stream_calls().submit(as_stream(stream), engine_, all);
    stream_calls().hold(as_stream(stream), held);
  }

  void sync(uint64_t stream, uint64_t address, nb::object object) {
    settle(*engine_);
    const auto held = std::make_shared<nb::object>(std::move(object));
    const GilRelease no_gil;
    stream_calls().sync(as_stream(stream), engine_, deferred_.size());
    copy_up(stream, address, held);
  }

  void run(uint64_t stream, const std::vector<uint64_t>& addresses, uint64_t address, nb::object object) {
    check(addresses);
    settle(*engine_);
    const auto held = std::make_shared<nb::object>(std::move(object));
    const GilRelease no_gil;
    copy_down(stream, addresses);
    stream_calls().run(as_stream(stream), engine_, immediate_, deferred_);
    copy_up(stream, address, held);
  }

 private:
  void check(const std::vector<uint64_t>& addresses) const {
    if (addresses.size() != inputs_.size())
      throw_invalid("addresses: got ", addresses.size(), ", expected ", inputs_.size());
  }

  void copy_down(uint64_t stream, const std::vector<uint64_t>& addresses) const {
    for (size_t i = 0; i < addresses.size(); ++i)
      CudaDriver::get().copy(host_address(inputs_[i]), addresses[i], inputs_[i].bytes(), as_stream(stream));
  }

  void copy_up(uint64_t stream, uint64_t address, const std::shared_ptr<const void>& held) const {
    CudaDriver::get().copy(address, host_address(output_), output_.bytes(), as_stream(stream));
    stream_calls().hold(as_stream(stream), held);
  }

  static uint64_t host_address(const Array& array) { return reinterpret_cast<uint64_t>(array.as<void>()); }

  std::shared_ptr<CPUInfer> engine_;
  Array output_;
  std::vector<Array> inputs_;
  std::vector<StreamTask> immediate_, deferred_;
};

}  // namespace

void bind_stream_pass(nb::module_& m) {
  nb::class_<StreamPass>(m, "StreamPass",
                         R"(A pass that streams do, any number of times, one after the other.

Parameters
----------
engine : CPUInfer
inputs : list of array
    What is copied down to, in memory that must not move.
tasks : list of (Task, array)
    To be submitted, each with what it writes: NaN there when it raises.
output : array
    What is copied up.
num_deferred : int
    So many of the last tasks are not waited for.)")
      .def(nb::init<std::shared_ptr<CPUInfer>, const std::vector<nb::object>&,
                    const std::vector<std::pair<PythonTask*, nb::object>>&, nb::handle, uint64_t>(),
           nb::arg("engine"), nb::arg("inputs"), nb::arg("tasks"), nb::arg("output"), nb::arg("num_deferred"))
      .def("submit", &StreamPass::submit, nb::arg("stream"), nb::arg("addresses"), nb::arg("held").none(),
           "Let a stream copy the inputs from their addresses on a device and submit the tasks; hold an "
           "object "
           "until it has done so.")
      .def("sync", &StreamPass::sync, nb::arg("stream"), nb::arg("address"), nb::arg("held").none(),
           "Let the stream wait for the tasks and copy the output up; hold an object until it has done so.")
      .def("run", &StreamPass::run, nb::arg("stream"), nb::arg("addresses"), nb::arg("address"),
           nb::arg("held").none(),
           "Both at once: the thread that the stream waits for does the tasks, so nobody has to be woken.");
}

}  // namespace ktmoe::bindings
