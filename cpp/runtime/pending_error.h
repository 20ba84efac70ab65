// An error that could not be reported when it happened: kept until a caller takes it.
#pragma once

#include <exception>
#include <mutex>
#include <utility>

namespace ktmoe {

class PendingError {
 public:
  // The first one counts until it is taken.
  void set(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (first_ == nullptr) first_ = std::move(error);
  }

  // Throws it, once.
  void rethrow() {
    std::exception_ptr error;
    {
      const std::lock_guard lock(mutex_);
      error = std::exchange(first_, nullptr);
    }
    if (error != nullptr) std::rethrow_exception(error);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

}  // namespace ktmoe
