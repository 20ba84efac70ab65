#include "runtime/stream_calls.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace ktmoe {

// The stream goes on: the error waits for who asks, and the result tells of it.
void StreamCalls::Call::fail(std::exception_ptr error) const {
  std::fill(result.begin(), result.end(), std::byte{0xff});
  const std::lock_guard lock(all->mutex_);
  if (all->first_error_ == nullptr) all->first_error_ = std::move(error);
}

// A task as a stream submits it, perhaps not for the last time. It has a copy of all that it needs, unless
// its call is kept for good.
class StreamCalls::Submitted final : public Task {
 public:
  explicit Submitted(const Call& call) {
    call_.all = call.all, call_.result = call.result, call_.is_captured = call.is_captured;
    if (call.is_captured) {
      kept_ = call.task.get();
    } else {
      call_.task = call.task, kept_ = call_.task.get();
    }
  }

  void run() override {
    try {
      kept_->run();
    } catch (...) {
      call_.fail(std::current_exception());
    }
  }
  bool ends_anywhere() const override { return call_.is_captured; }

 private:
  Call call_;
  Task* kept_;
};

void StreamCalls::submit(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine,
                         std::shared_ptr<Task> task, std::span<std::byte> result) {
  auto call = std::make_unique<Call>();
  call->engine = std::move(engine), call->task = std::move(task), call->result = result;
  launch(stream, std::move(call));
}

void StreamCalls::sync(CudaDriver::Stream stream, std::shared_ptr<CPUInfer> engine,
                       uint64_t allow_n_pending) {
  auto call = std::make_unique<Call>();
  call->engine = std::move(engine), call->allow_n_pending = allow_n_pending;
  launch(stream, std::move(call));
}

void StreamCalls::hold(CudaDriver::Stream stream, std::shared_ptr<const void> held) {
  auto call = std::make_unique<Call>();
  call->held = std::move(held);
  launch(stream, std::move(call));
}

void StreamCalls::launch(CudaDriver::Stream stream, std::unique_ptr<Call> call) {
  const CudaDriver& driver = CudaDriver::get();
  call->all = this, call->is_captured = driver.is_capturing(stream);
  Call* data = call.get();
  {
    const std::lock_guard lock(mutex_);
    calls_.push_back(std::move(call));
  }
  try {
    driver.launch(stream, happen, data);
  } catch (...) {
    data->has_happened.store(true);  // forgotten soon
    throw;
  }
}

// On a thread of the driver, which an exception must not reach.
void StreamCalls::happen(void* data) {
  Call& call = *static_cast<Call*>(data);
  try {
    if (call.task != nullptr) {
      call.engine->submit(std::make_unique<Submitted>(call));
    } else if (call.engine != nullptr) {
      call.engine->finish(call.allow_n_pending);
    }
  } catch (...) {
    call.fail(std::current_exception());
  }
  if (!call.is_captured) call.has_happened.store(true);
}

void StreamCalls::forget_happened() {
  std::vector<std::unique_ptr<Call>> happened;  // destroyed without the lock
  const std::lock_guard lock(mutex_);
  for (auto at = calls_.begin(); at != calls_.end();) {
    const auto next = std::next(at);
    if ((*at)->has_happened.load()) {
      happened.push_back(std::move(*at));
      calls_.erase(at);
    }
    at = next;
  }
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
