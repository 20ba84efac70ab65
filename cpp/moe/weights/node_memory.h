// Memory on a given NUMA node.
#pragma once

#include <cstddef>
#include <utility>

namespace ktmoe {

// Mapped pages, on `node` if the system can place them there. Throws std::bad_alloc.
class NodeMemory {
 public:
  NodeMemory() = default;
  NodeMemory(size_t bytes, int node);
  ~NodeMemory();
  NodeMemory(NodeMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  NodeMemory& operator=(NodeMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace ktmoe
