#include "bindings/streams/stream_session.h"

namespace ktmoe::bindings {

StreamTask stream_task(PythonTask& task, nb::handle result) {
  std::span<std::byte> bytes;
  if (!result.is_none()) {
    const Array array = Array::write(result, "result");
    bytes = {array.expect_contiguous().as<std::byte>(), array.bytes()};
  }
  return {task.take(), bytes};
}

void release_done(CPUInfer& engine) {
  engine.take_finished();
  StreamSession::of_process().release_done(StreamSession::Destroyer::kLockHolder);
}

}  // namespace ktmoe::bindings
