#include "moe/weights/node_memory.h"

#include <sys/mman.h>

#include <new>

#include "runtime/topology.h"

namespace ktmoe {

NodeMemory::NodeMemory(size_t bytes, int node) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(p);
  bind_memory(p, bytes, node);  // if the system refuses, first touch decides
}

NodeMemory::~NodeMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

}  // namespace ktmoe
