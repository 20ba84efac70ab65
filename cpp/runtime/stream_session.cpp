#include "runtime/stream_session.h"

#include <algorithm>
#include <utility>

namespace ktmoe {

// A task as a stream submits it, perhaps not for the last time: then its owner is kept for good.
class StreamCalls::Submitted final : public Task {
 public:
  Submitted(StreamCalls& all, const StreamTask& of, bool is_captured)
      : all_(all), owner_(is_captured ? nullptr : of.task), task_(*of.task), result_(of.result) {}

  void run() override {
    try {
      task_.run();
    } catch (...) {
      all_.fail(result_, std::current_exception());
    }
  }
  bool ends_anywhere() const override { return owner_ == nullptr; }

 private:
  StreamCalls& all_;
  std::shared_ptr<Task> owner_;
  Task& task_;
  std::span<std::byte> result_;
};

void StreamCalls::call(CudaDriver::Stream stream, std::function<void()> work, std::span<std::byte> result) {
  launch(stream, CudaDriver::get().is_capturing(stream), std::move(work), result);
}

void StreamCalls::submit(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine,
                         std::vector<StreamTask> tasks) {
  const bool is_captured = CudaDriver::get().is_capturing(stream);
  launch(stream, is_captured, [this, engine = std::move(engine), tasks = std::move(tasks), is_captured] {
    submit_now(*engine, tasks, is_captured, /*wake=*/true);
  });
}

void StreamCalls::run(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine,
                      std::vector<StreamTask> tasks, std::vector<StreamTask> deferred) {
  const bool is_captured = CudaDriver::get().is_capturing(stream);
  launch(stream, is_captured,
         [this, engine = std::move(engine), tasks = std::move(tasks), deferred = std::move(deferred),
          is_captured] {
           submit_now(*engine, tasks, is_captured, /*wake=*/false);
           engine->finish();
           submit_now(*engine, deferred, is_captured, /*wake=*/true);
         });
}

// With wake = false somebody is about to wait.
void StreamCalls::submit_now(CPUInfer& engine, const std::vector<StreamTask>& tasks, bool is_captured,
                             bool wake) {
  for (const StreamTask& each : tasks) {
    try {
      engine.submit(std::make_unique<Submitted>(*this, each, is_captured), wake);
    } catch (...) {
      fail(each.result, std::current_exception());
    }
  }
}

void StreamCalls::sync(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine,
                       uint64_t allow_n_pending) {
  call(stream, [engine = std::move(engine), allow_n_pending] { engine->finish(allow_n_pending); });
}

void StreamCalls::hold(CudaDriver::Stream stream, std::shared_ptr<const void> held) {
  const CudaDriver& driver = CudaDriver::get();
  const bool is_captured = driver.is_capturing(stream);
  const CudaDriver::Event event = is_captured ? nullptr : driver.record(stream);
  const std::lock_guard lock(mutex_);
  if (is_captured) {
    captured_objects_.push_back(std::move(held));
  } else {
    held_.push_back({event, std::move(held)});
  }
}

void StreamCalls::launch(CudaDriver::Stream stream, bool is_captured, std::function<void()> work,
                         std::span<std::byte> result) {
  std::unique_ptr<Call> call(new Call{this, std::move(work), result, is_captured});
  Call* data = call.get();
  {
    const std::lock_guard lock(mutex_);
    (is_captured ? captured_calls_ : calls_).push_back(std::move(call));
  }
  try {
    CudaDriver::get().launch(stream, happen, data);
  } catch (...) {
    data->has_happened.store(true);  // forgotten soon
    throw;
  }
}

// The stream goes on: the error waits for who asks, and the result tells of it.
void StreamCalls::fail(std::span<std::byte> result, std::exception_ptr error) {
  std::fill(result.begin(), result.end(), std::byte{0xff});
  const std::lock_guard lock(mutex_);
  if (first_error_ == nullptr) first_error_ = std::move(error);
}

// On a thread of the driver, which an exception must not reach.
void StreamCalls::happen(void* data) {
  Call& call = *static_cast<Call*>(data);
  try {
    call.work();
  } catch (...) {
    call.all->fail(call.result, std::current_exception());
  }
  if (!call.is_captured) call.has_happened.store(true);
}

void StreamCalls::forget_happened() {
  std::list<std::unique_ptr<Call>> calls;  // destroyed without the lock
  std::list<Held> held;
  {
    const std::lock_guard lock(mutex_);
    for (auto at = calls_.begin(); at != calls_.end();) {
      const auto next = std::next(at);
      if ((*at)->has_happened.load()) calls.splice(calls.end(), calls_, at);
      at = next;
    }
    held.swap(held_);
  }
  // The driver is not asked under the lock, for which one of its threads may wait.
  held.remove_if([](const Held& one) { return CudaDriver::get().has_happened(one.event); });
  const std::lock_guard lock(mutex_);
  held_.splice(held_.begin(), held);
}

void StreamCalls::rethrow() {
  std::exception_ptr error;
  {
    const std::lock_guard lock(mutex_);
    error = std::exchange(first_error_, nullptr);
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace ktmoe
