#include "bindings/streams/stream_session.h"

#include "runtime/per_process.h"

namespace ktmoe::bindings {

StreamCalls& stream_calls() { return of_this_process<StreamCalls>(); }

StreamTask stream_task(PythonTask& task, nb::handle result) {
  std::span<std::byte> bytes;
  if (!result.is_none()) {
    const Array array = Array::write(result, "result");
    bytes = {array.expect_contiguous().as<std::byte>(), array.bytes()};
  }
  return {task.take(), bytes};
}

void settle(CPUInfer& engine) {
  engine.take_finished();
  stream_calls().forget_happened();
}

}  // namespace ktmoe::bindings
