// Scratch memory that calls borrow: kept between calls so that a call touches warm pages, owned by the engine
// so that the layers of a model share it, and lent exclusively so that two calls may run at once.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "core/aligned_buffer.h"

namespace ktmoe {

class ScratchPool {
 public:
  // A borrowed buffer, given back at the end of its scope.
  class Lease {
   public:
    Lease(ScratchPool& pool, AlignedBuffer buffer) : pool_(pool), buffer_(std::move(buffer)) {}
    ~Lease() { pool_.give_back(std::move(buffer_)); }
    Lease(Lease&& other) noexcept : pool_(other.pool_), buffer_(std::move(other.buffer_)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    std::byte* data() const { return buffer_.data(); }

   private:
    ScratchPool& pool_;
    AlignedBuffer buffer_;
  };

  // At least `bytes`, aligned to a cache line, contents undefined.
  Lease lease(size_t bytes) {
    AlignedBuffer buffer = take_largest();
    buffer.reserve(bytes);
    return Lease(*this, std::move(buffer));
  }

 private:
  AlignedBuffer take_largest() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) return {};
    const auto by_size = [](const AlignedBuffer& a, const AlignedBuffer& b) {
      return a.capacity() < b.capacity();
    };
    const auto largest = std::max_element(free_.begin(), free_.end(), by_size);
    AlignedBuffer buffer = std::move(*largest);
    free_.erase(largest);
    return buffer;
  }

  void give_back(AlignedBuffer buffer) noexcept {
    std::lock_guard lock(mutex_);
    if (buffer.data() != nullptr) free_.push_back(std::move(buffer));
  }

  std::mutex mutex_;
  std::vector<AlignedBuffer> free_;
};

}  // namespace ktmoe
