// Memory for scratch: aligned to cache lines, grown on demand, never shrunk behind anyone's back.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/align.h"

namespace ktmoe {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes) { reserve(bytes); }

  // Makes room for `bytes`. Contents are lost when the buffer has to grow: the old memory is given back
  // first, so that the two never add up; on bad_alloc the buffer is empty.
  void reserve(size_t bytes) {
    if (bytes <= capacity()) return;
    data_.reset();
    const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
    void* fresh = std::aligned_alloc(alignment, round_up(bytes, alignment));
    if (fresh == nullptr) throw std::bad_alloc();
    data_.reset(static_cast<std::byte*>(fresh));
#if defined(__linux__)
    if (alignment == kHugePage) madvise(fresh, round_up(bytes, alignment), MADV_HUGEPAGE);  // a hint only
#endif
    capacity_ = bytes;
  }

  std::byte* data() const { return data_.get(); }
  size_t capacity() const { return data_ ? capacity_ : 0; }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  // Large scratch starts on a 2 MiB boundary, so that transparent huge pages can back it.
  static constexpr size_t kHugePage = size_t{2} << 20;
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace ktmoe
