// Tasks that a CUDA stream submits and waits for: by functions that the driver calls on threads of its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/cpuinfer.h"
#include "runtime/cuda_driver.h"

namespace ktmoe {

// A task, and what it writes: all bits set when it throws or is refused, which is NaN, not old numbers.
struct StreamTask {
  std::shared_ptr<Task> task;
  std::span<std::byte> result;
};

// A call by the driver refers to an entry here. One that has happened may be forgotten; of a stream that is
// being captured into a graph, which may be replayed at any time, it is kept.
class StreamCalls {
 public:
  // When the stream comes there, the driver calls `work`, which must not call CUDA, and the stream waits for
  // it. What `result` becomes when it throws is said above.
  void call(CudaDriver::Stream stream, std::function<void()> work, std::span<std::byte> result = {});

  // When the stream comes there, the tasks are submitted. May be repeated by a graph.
  void submit(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine, std::vector<StreamTask> tasks);

  // When the stream comes there, the tasks are done, on the driver's thread and the engine's workers; the
  // stream waits for them, but not for those that are deferred, which are submitted then.
  void run(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine, std::vector<StreamTask> tasks,
           std::vector<StreamTask> deferred);

  // When the stream comes there, it waits until at most so many of the engine's tasks are unfinished.
  void sync(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine, uint64_t allow_n_pending);

  // Keeps something until the stream comes there, which does not wait: what is copied from or to before.
  void hold(CudaDriver::Stream stream, std::shared_ptr<const void> held);

  // Forgets what has happened, for a thread that may destroy what is held.
  void forget_happened();
  // Throws the first exception since the last time.
  void rethrow();

 private:
  struct Call {
    StreamCalls* all;
    std::function<void()> work;
    std::span<std::byte> result;
    bool is_captured;
    std::atomic<bool> has_happened{false};
  };
  struct Held {
    CudaDriver::Event event;
    std::shared_ptr<const void> object;
  };
  class Submitted;

  void launch(CudaDriver::Stream stream, bool is_captured, std::function<void()> work,
              std::span<std::byte> result = {});
  void submit_now(CPUInfer& engine, const std::vector<StreamTask>& tasks, bool is_captured, bool wake);
  void fail(std::span<std::byte> result, std::exception_ptr error);
  static void happen(void* data);

  std::mutex mutex_;
  std::list<std::unique_ptr<Call>> calls_;
  std::list<Held> held_;
  std::list<std::unique_ptr<Call>> captured_calls_;  // for good, as below
  std::list<std::shared_ptr<const void>> captured_objects_;
  std::exception_ptr first_error_;
};

}  // namespace ktmoe
