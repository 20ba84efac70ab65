#include "moe/expert_matrices.h"

#include <algorithm>
#include <cstring>

#include "core/aligned_buffer.h"

namespace ktmoe {
namespace {

// The rows of one projection, all experts, one after the other.
struct Block {
  const std::vector<WeightView>* source;
  std::vector<WeightView>* target;
  Span rows;
  size_t row_bytes;

  size_t rows_bytes() const { return round_up(rows.size() * row_bytes, kCacheLine); }
  // Row scales lie behind the rows.
  size_t expert_bytes(size_t e) const {
    const bool scaled = (*source)[e].row_scale != nullptr;
    return rows_bytes() + (scaled ? round_up(rows.size() * sizeof(float), kCacheLine) : 0);
  }
};

void copy_expert(const Block& block, size_t e, std::byte* to) {
  const WeightView& source = (*block.source)[e];
  for (uint32_t n = block.rows.begin; n < block.rows.end; ++n)
    std::memcpy(to + (n - block.rows.begin) * block.row_bytes, source.row(n), block.row_bytes);
  float* scales = nullptr;
  if (source.row_scale) {
    scales = reinterpret_cast<float*>(to + block.rows_bytes());
    std::copy(source.row_scale + block.rows.begin, source.row_scale + block.rows.end, scales);
  }
  (*block.target)[e] =
      WeightView{to, static_cast<ptrdiff_t>(block.row_bytes), source.k, scales}.numbered_from(
          block.rows.begin);
}

}  // namespace

NodeMatrices copy_to_node(const ExpertMatrices& source, const OutputShare& share, size_t first_row_bytes,
                          size_t down_row_bytes, int subpool, WorkerPool& pool) {
  NodeMatrices node;
  ExpertMatrices& target = node.matrices;
  const std::vector<Block> blocks = {{&source.gate, &target.gate, share.intermediate, first_row_bytes},
                                     {&source.up, &target.up, share.intermediate, first_row_bytes},
                                     {&source.down, &target.down, share.hidden, down_row_bytes}};
  size_t bytes = 0;
  for (const Block& block : blocks)
    for (size_t e = 0; e < block.source->size(); ++e) bytes += block.expert_bytes(e);
  node.memory = NodeMemory(bytes, pool.numa_node(subpool));

  std::byte* at = node.memory.data();
  std::vector<uint32_t> num_tasks(static_cast<size_t>(pool.num_subpools()), 0);
  for (const Block& block : blocks) {
    block.target->resize(block.source->size());
    std::vector<std::byte*> to;
    for (size_t e = 0; e < block.source->size(); ++e) {
      to.push_back(at);
      at += block.expert_bytes(e);
    }
    num_tasks[static_cast<size_t>(subpool)] = static_cast<uint32_t>(to.size());
    pool.run(num_tasks, [&](const Worker&, int, uint32_t e) { copy_expert(block, e, to[e]); });
  }
  return node;
}

}  // namespace ktmoe
