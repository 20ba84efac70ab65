#include "runtime/stream_session.h"

#include <algorithm>
#include <utility>

#include "core/aligned_buffer.h"
#include "runtime/per_process.h"

namespace ktmoe {

class PinnedMemory {
 public:
  explicit PinnedMemory(size_t bytes) : memory_(bytes) {
    CudaDriver::get().lock_pages(memory_.data(), bytes);
  }
  ~PinnedMemory() { CudaDriver::get().unlock_pages(memory_.data()); }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const { return memory_.data(); }
  size_t bytes() const { return memory_.capacity(); }

 private:
  AlignedBuffer memory_;
};

// A task as a stream submits it, perhaps not for the last time: then its owner is kept for good.
class StreamSession::Submitted final : public Task {
 public:
  Submitted(StreamSession& session, const StreamTask& of, bool is_captured)
      : session_(session), owner_(is_captured ? nullptr : of.task), task_(*of.task), result_(of.result) {}

  void run() override {
    try {
      task_.run();
    } catch (...) {
      session_.fail(result_, std::current_exception());
    }
  }
  bool ends_anywhere() const override { return owner_ == nullptr; }

 private:
  StreamSession& session_;
  std::shared_ptr<Task> owner_;
  Task& task_;
  std::span<std::byte> result_;
};

StreamSession& StreamSession::of_process() { return of_this_process<StreamSession>(); }

void StreamSession::copy_to_host(Stream stream, std::span<const DeviceCopy> copies) const {
  for (const DeviceCopy& each : copies)
    CudaDriver::get().copy(reinterpret_cast<uint64_t>(each.host), each.device, each.bytes, stream);
}

void StreamSession::copy_to_device(Stream stream, std::span<const DeviceCopy> copies) const {
  for (const DeviceCopy& each : copies)
    CudaDriver::get().copy(each.device, reinterpret_cast<uint64_t>(each.host), each.bytes, stream);
}

void StreamSession::call(Stream stream, std::function<void()> work, std::span<std::byte> result,
                         Destroyer destroyer) {
  const bool is_captured = CudaDriver::get().is_capturing(stream);
  launch(stream, std::unique_ptr<Call>(new Call{this, std::move(work), result, destroyer, is_captured}));
}

void StreamSession::submit(Stream stream, std::shared_ptr<CPUInfer> engine, std::vector<StreamTask> tasks) {
  const bool is_captured = CudaDriver::get().is_capturing(stream);
  auto work = [this, engine = std::move(engine), tasks = std::move(tasks), is_captured] {
    submit_now(*engine, tasks, is_captured, /*wake=*/true);
  };
  launch(stream,
         std::unique_ptr<Call>(new Call{this, std::move(work), {}, Destroyer::kLockHolder, is_captured}));
}

void StreamSession::run(Stream stream, std::shared_ptr<CPUInfer> engine, std::vector<StreamTask> tasks,
                        std::vector<StreamTask> deferred) {
  const bool is_captured = CudaDriver::get().is_capturing(stream);
  auto work = [this, engine = std::move(engine), tasks = std::move(tasks), deferred = std::move(deferred),
               is_captured] {
    submit_now(*engine, tasks, is_captured, /*wake=*/false);
    engine->finish();
    submit_now(*engine, deferred, is_captured, /*wake=*/true);
  };
  launch(stream,
         std::unique_ptr<Call>(new Call{this, std::move(work), {}, Destroyer::kLockHolder, is_captured}));
}

// With wake = false a thread is about to wait.
void StreamSession::submit_now(CPUInfer& engine, const std::vector<StreamTask>& tasks, bool is_captured,
                               bool wake) {
  for (const StreamTask& each : tasks) {
    try {
      engine.submit(std::make_unique<Submitted>(*this, each, is_captured), wake);
    } catch (...) {
      fail(each.result, std::current_exception());
    }
  }
}

void StreamSession::sync(Stream stream, std::shared_ptr<CPUInfer> engine, uint64_t allow_n_pending) {
  call(
      stream, [engine = std::move(engine), allow_n_pending] { engine->finish(allow_n_pending); }, {},
      Destroyer::kLockHolder);
}

void StreamSession::keep_alive(Stream stream, std::shared_ptr<const void> object, Destroyer destroyer) {
  const CudaDriver& driver = CudaDriver::get();
  const bool is_captured = driver.is_capturing(stream);
  const CudaDriver::Event event = is_captured ? nullptr : driver.record_event(stream);
  const std::lock_guard lock(mutex_);
  if (is_captured) {
    captured_objects_.push_back(std::move(object));
  } else {
    kept_.push_back({event, std::move(object), destroyer});
  }
}

StreamSession::StagingLease StreamSession::lease_staging(Stream stream, size_t bytes) {
  constexpr size_t kSmallest = size_t{2} << 20;  // a huge page
  std::unique_lock lock(staging_mutex_);
  std::shared_ptr<PinnedMemory>& memory = staging_[stream];
  if (memory == nullptr || memory->bytes() < bytes) {
    size_t size = kSmallest;
    while (size < bytes) size *= 2;
    auto larger = std::make_shared<PinnedMemory>(size);
    if (memory != nullptr) keep_alive(stream, memory, Destroyer::kAnyThread);  // for the calls before
    memory = std::move(larger);
  }
  return {std::move(lock), memory->data()};
}

void StreamSession::launch(Stream stream, std::unique_ptr<Call> call) {
  Call* data = call.get();
  {
    const std::lock_guard lock(mutex_);
    (call->is_captured ? captured_calls_ : calls_).push_back(std::move(call));
  }
  try {
    CudaDriver::get().launch(stream, run_callback, data);
  } catch (...) {
    data->is_done.store(true);
    throw;
  }
}

void StreamSession::fail(std::span<std::byte> result, std::exception_ptr error) {
  std::fill(result.begin(), result.end(), std::byte{0xff});
  error_.set(std::move(error));
}

// On a thread of the driver, which an exception must not reach.
void StreamSession::run_callback(void* data) {
  Call& call = *static_cast<Call*>(data);
  try {
    call.work();
  } catch (...) {
    call.session->fail(call.result, std::current_exception());
  }
  if (!call.is_captured) call.is_done.store(true);
}

void StreamSession::release_done(Destroyer by) {
  const auto may_destroy = [by](Destroyer destroyer) {
    return by == Destroyer::kLockHolder || destroyer == Destroyer::kAnyThread;
  };
  std::list<std::unique_ptr<Call>> calls;  // destroyed without the lock
  std::list<Kept> kept;
  {
    const std::lock_guard lock(mutex_);
    for (auto at = calls_.begin(); at != calls_.end();) {
      const auto next = std::next(at);
      if ((*at)->is_done.load() && may_destroy((*at)->destroyer)) calls.splice(calls.end(), calls_, at);
      at = next;
    }
    for (auto at = kept_.begin(); at != kept_.end();) {
      const auto next = std::next(at);
      if (may_destroy(at->destroyer)) kept.splice(kept.end(), kept_, at);
      at = next;
    }
  }
  // The driver is not called under the lock, as one of its threads may wait for it.
  kept.remove_if([](const Kept& one) { return CudaDriver::get().is_complete(one.event); });
  const std::lock_guard lock(mutex_);
  kept_.splice(kept_.begin(), kept);
}

}  // namespace ktmoe
