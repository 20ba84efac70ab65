// Memory that ends where it ends: an access behind the last value faults in every build, under qemu too.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

#include "core/aligned_buffer.h"

namespace ktmoe::test {

// `count` values of a trivial type in front of a page that may not be touched. Every byte starts as 0xff,
// which is NaN in every float type: what a kernel forgets to write, or reads without right, shows in its
// result.
template <class T>
class Guarded {
 public:
  // The last value ends exactly at the guard page; the first one is aligned as that leaves it.
  explicit Guarded(size_t count) : Guarded(count, 0) {}

  // The first value starts on a cache line; less than a line is left between the last one and the guard page.
  static Guarded on_cache_line(size_t count) {
    const size_t bytes = count * sizeof(T);
    return Guarded(count, round_up(bytes, kCacheLine) - bytes);
  }

  Guarded(Guarded&& other) noexcept
      : mapping_(std::exchange(other.mapping_, nullptr)),
        mapped_(other.mapped_),
        data_(other.data_),
        count_(other.count_) {}
  Guarded& operator=(Guarded&&) = delete;
  ~Guarded() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_);
  }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_[i]; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }

 private:
  Guarded(size_t count, size_t slack) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = round_up(std::max(count * sizeof(T) + slack, size_t{1}), page);
    mapped_ = used + page;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    std::byte* end = static_cast<std::byte*>(mapping_) + used;
    mprotect(end, page, PROT_NONE);
    std::memset(mapping_, 0xff, used);
    data_ = reinterpret_cast<T*>(end - slack - count * sizeof(T));
  }

  void* mapping_;
  size_t mapped_;
  T* data_;
  size_t count_;
};

}  // namespace ktmoe::test
