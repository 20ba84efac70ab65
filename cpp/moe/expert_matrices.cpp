#include "moe/expert_matrices.h"

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
  std::byte* to = nullptr;

  size_t expert_bytes() const { return round_up(rows.size() * row_bytes, kCacheLine); }
};

void copy_expert(const Block& block, size_t e) {
  std::byte* to = block.to + e * block.expert_bytes();
  for (uint32_t n = block.rows.begin; n < block.rows.end; ++n)
    std::memcpy(to + (n - block.rows.begin) * block.row_bytes, (*block.source)[e].row(n), block.row_bytes);
  (*block.target)[e] =
      WeightView{to, static_cast<ptrdiff_t>(block.row_bytes)}.numbered_from(block.rows.begin);
}

}  // namespace

NodeMatrices copy_to_node(const ExpertMatrices& source, const OutputShare& share, size_t first_row_bytes,
                          size_t down_row_bytes, int subpool, WorkerPool& pool) {
  NodeMatrices node;
  ExpertMatrices& target = node.matrices;
  std::vector<Block> blocks = {{&source.gate, &target.gate, share.intermediate, first_row_bytes},
                               {&source.up, &target.up, share.intermediate, first_row_bytes},
                               {&source.down, &target.down, share.hidden, down_row_bytes}};
  size_t bytes = 0;
  for (const Block& block : blocks) bytes += block.source->size() * block.expert_bytes();
  node.memory = NodeMemory(bytes, pool.numa_node(subpool));

  std::byte* at = node.memory.data();
  std::vector<uint32_t> num_tasks(static_cast<size_t>(pool.num_subpools()), 0);
  for (Block& block : blocks) {
    block.to = at;
    block.target->resize(block.source->size());
    at += block.source->size() * block.expert_bytes();
    num_tasks[static_cast<size_t>(subpool)] = static_cast<uint32_t>(block.source->size());
    pool.run(num_tasks, [&](const Worker&, int, uint32_t e) { copy_expert(block, e); });
  }
  return node;
}

}  // namespace ktmoe
