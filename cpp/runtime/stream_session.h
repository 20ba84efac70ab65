// CUDA streams of this process: host callbacks, tasks that a stream submits and waits for, staging buffers,
// and the objects kept alive meanwhile. Python calls and JAX programs share it.
//
//   callback  made                 a stream that is not captured    a stream that is captured into a graph
//   --------  -------------------  -------------------------------  --------------------------------------
//   launched  by call, submit,     the driver will call it once     the driver may call it at any time
//             run, sync
//   done      it has returned, or  release_done may destroy it      never
//             was refused
//
//   object kept alive              until the stream reaches it;     permanently
//                                  release_done polls its event
//
// An exception cannot stop a stream: the result of the work becomes NaN, all bits set, and the exception is
// pending. A process has one pending error, the first one; the next sync of an engine, call with a stream, or
// call of a JAX program on a GPU takes and raises it.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "runtime/cpuinfer.h"
#include "runtime/cuda_driver.h"
#include "runtime/pending_error.h"

namespace ktmoe {

// A task and its result, which becomes NaN when the task throws or is refused.
struct StreamTask {
  std::shared_ptr<Task> task;
  std::span<std::byte> result;
};

// An array on a device, and its place in the memory of the host.
struct DeviceCopy {
  uint64_t device;
  void* host;
  size_t bytes;
};

// Pinned host memory, so that copies from and to a GPU need not wait for the CPU.
class PinnedMemory;

class StreamSession {
 public:
  using Stream = CudaDriver::Stream;

  // Which threads may destroy an object: any, or those with the lock of its creator (the GIL).
  enum class Destroyer : uint8_t { kAnyThread, kLockHolder };

  static StreamSession& of_process();

  // Copies in the stream.
  void copy_to_host(Stream stream, std::span<const DeviceCopy> copies) const;
  void copy_to_device(Stream stream, std::span<const DeviceCopy> copies) const;

  // When the stream reaches this point, the driver calls `work`, which must not call CUDA, and the stream
  // waits for it. `result` becomes NaN when it throws.
  void call(Stream stream, std::function<void()> work, std::span<std::byte> result, Destroyer destroyer);

  // When the stream reaches this point, the tasks are submitted. May be repeated by a graph. These tasks are
  // to be destroyed by a lock holder, as those of `run`.
  void submit(Stream stream, std::shared_ptr<CPUInfer> engine, std::vector<StreamTask> tasks);

  // When the stream reaches this point, the tasks are done, on the driver's thread and the engine's workers.
  // The stream waits for them, but not for the deferred ones, which are submitted then.
  void run(Stream stream, std::shared_ptr<CPUInfer> engine, std::vector<StreamTask> tasks,
           std::vector<StreamTask> deferred);

  // When the stream reaches this point, it waits until at most so many of the engine's tasks are unfinished.
  void sync(Stream stream, std::shared_ptr<CPUInfer> engine, uint64_t allow_n_pending);

  // Keeps an object alive until the stream reaches this point, without waiting: the copies before it.
  void keep_alive(Stream stream, std::shared_ptr<const void> object, Destroyer destroyer);

  // Staging memory of a stream, which its calls use one after the other. Other threads wait until the lease
  // ends; by then all work that uses the memory must be in the stream.
  class StagingLease {
   public:
    StagingLease(std::unique_lock<std::mutex> lock, std::byte* data) : lock_(std::move(lock)), data_(data) {}
    std::byte* data() const { return data_; }

   private:
    std::unique_lock<std::mutex> lock_;
    std::byte* data_;
  };
  StagingLease lease_staging(Stream stream, size_t bytes);

  // Destroys objects that are no longer needed and that `by` may destroy; with the lock, all of them.
  void release_done(Destroyer by);

  // Throws the pending error, if there is one.
  void rethrow() { error_.rethrow(); }

 private:
  struct Call {
    StreamSession* session;
    std::function<void()> work;
    std::span<std::byte> result;
    Destroyer destroyer;
    bool is_captured;
    std::atomic<bool> is_done{false};
  };
  struct Kept {
    CudaDriver::Event event;
    std::shared_ptr<const void> object;
    Destroyer destroyer;
  };
  class Submitted;

  void launch(Stream stream, std::unique_ptr<Call> call);
  void submit_now(CPUInfer& engine, const std::vector<StreamTask>& tasks, bool is_captured, bool wake);
  void fail(std::span<std::byte> result, std::exception_ptr error);
  static void run_callback(void* data);

  PendingError error_;

  std::mutex mutex_;  // of the lists
  std::list<std::unique_ptr<Call>> calls_;
  std::list<Kept> kept_;
  std::list<std::unique_ptr<Call>> captured_calls_;  // for good, as below
  std::list<std::shared_ptr<const void>> captured_objects_;

  std::mutex staging_mutex_;
  std::unordered_map<Stream, std::shared_ptr<PinnedMemory>> staging_;
};

}  // namespace ktmoe
