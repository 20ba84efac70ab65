// Offsets into one borrowed buffer: all requests are summed first, then the buffer is borrowed.
#pragma once

#include <cstddef>

#include "core/aligned_buffer.h"

namespace ktmoe {

class ScratchPlan {
 public:
  // The offset of `bytes` more, aligned to a cache line.
  size_t take(size_t bytes) {
    const size_t at = bytes_;
    bytes_ += round_up(bytes, kCacheLine);
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

}  // namespace ktmoe
