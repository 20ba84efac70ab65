// Tasks that a CUDA stream submits and waits for: by functions that the driver calls on threads of its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <span>

#include "runtime/cpuinfer.h"
#include "runtime/cuda_driver.h"

namespace ktmoe {

// A call by the driver refers to an entry here. One that has happened may be forgotten; of a stream that is
// being captured into a graph, which may be replayed at any time, it is kept.
class StreamCalls {
 public:
  // When the stream comes there, the task is submitted. May be repeated by a graph. What it leaves in
  // `result` when it throws, or is refused, is NaN, not old numbers.
  void submit(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine, std::shared_ptr<Task> task,
              std::span<std::byte> result);

  // When the stream comes there, it waits until at most so many of the engine's tasks are unfinished.
  void sync(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine, uint64_t allow_n_pending);

  // Keeps something until the stream comes there: what is copied from or to before.
  void hold(CudaDriver::Stream stream, std::shared_ptr<const void> held);

  // Forgets calls that have happened, for a thread that may destroy what they hold.
  void forget_happened();
  // Throws the first exception of their tasks since the last time.
  void rethrow();

 private:
  struct Call {
    StreamCalls* all = nullptr;
    std::shared_ptr<CPUInfer> engine;  // null: only to hold something
    std::shared_ptr<Task> task;        // null: to wait
    std::span<std::byte> result;
    uint64_t allow_n_pending = 0;
    std::shared_ptr<const void> held;
    bool is_captured = false;
    std::atomic<bool> has_happened{false};

    void fail(std::exception_ptr error) const;
  };
  class Submitted;

  void launch(CudaDriver::Stream stream, std::unique_ptr<Call> call);
  static void happen(void* data);

  std::mutex mutex_;
  std::list<std::unique_ptr<Call>> calls_;
  std::exception_ptr first_error_;
};

}  // namespace ktmoe
