#include "runtime/parallel_copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/align.h"

namespace ktmoe {

void parallel_copy(WorkerPool& pool, const std::byte* from, std::byte* to, size_t bytes) {
  constexpr size_t kChunk = size_t{1} << 18;
  pool.run(static_cast<uint32_t>(div_up(bytes, kChunk)), [&](const Worker&, int, uint32_t i) {
    const size_t begin = i * kChunk;
    std::memcpy(to + begin, from + begin, std::min(kChunk, bytes - begin));
  });
}

}  // namespace ktmoe
