#include "moe/weights/expert_matrices.h"

#include <algorithm>
#include <cstring>

#include "core/aligned_buffer.h"
#include "formats/registry.h"

namespace ktmoe {
namespace {

// The rows of one projection, expert after expert. In memory an expert's rows are followed by its channel
// scales and then by its block scales, where the format has them.
struct Block {
  const std::vector<WeightView>* source;
  std::vector<WeightView>* target;
  Span rows;
  size_t row_bytes, scale_bytes;
  uint32_t scale_rows;

  Span rows_of_scales() const {
    if (scale_rows == 0) return {0, 0};
    return {rows.begin / scale_rows, static_cast<uint32_t>(div_up(rows.end, size_t{scale_rows}))};
  }
  size_t rows_bytes() const { return round_up(rows.size() * row_bytes, kCacheLine); }
  size_t channel_scale_bytes(size_t e) const {
    const bool scaled = (*source)[e].channel_scale != nullptr;
    return scaled ? round_up(rows.size() * sizeof(float), kCacheLine) : 0;
  }
  size_t expert_bytes(size_t e) const {
    return rows_bytes() + channel_scale_bytes(e) +
           round_up(rows_of_scales().size() * scale_bytes, kCacheLine);
  }
};

void copy_expert(const Block& block, size_t e, std::byte* to) {
  const WeightView& source = (*block.source)[e];
  for (uint32_t n = block.rows.begin; n < block.rows.end; ++n)
    std::memcpy(to + (n - block.rows.begin) * block.row_bytes, source.row(n), block.row_bytes);
  WeightView copy{to, static_cast<ptrdiff_t>(block.row_bytes), source.k};
  copy.format = source.format;
  if (source.channel_scale) {
    auto* scales = reinterpret_cast<float*>(to + block.rows_bytes());
    std::copy(source.channel_scale + block.rows.begin, source.channel_scale + block.rows.end, scales);
    copy.channel_scale = scales;
  }
  if (block.scale_rows != 0) {
    std::byte* scales = to + block.rows_bytes() + block.channel_scale_bytes(e);
    const Span rows = block.rows_of_scales();
    for (uint32_t i = rows.begin; i < rows.end; ++i)
      std::memcpy(scales + (i - rows.begin) * block.scale_bytes,
                  source.block_scales_of(size_t{i} * block.scale_rows, block.scale_rows), block.scale_bytes);
    copy.block_scales = scales, copy.block_scales_stride_bytes = static_cast<ptrdiff_t>(block.scale_bytes);
    copy.block_scales_row = block.rows.begin % block.scale_rows;
  }
  (*block.target)[e] = copy.numbered_from(block.rows.begin);
}

}  // namespace

NodeMatrices copy_to_node(const ExpertMatrices& source, const OutputShare& share, int subpool,
                          WorkerPool& pool) {
  NodeMatrices node;
  ExpertMatrices& target = node.matrices;
  const auto block = [&](const std::vector<WeightView>& from, std::vector<WeightView>& to, const Span& rows) {
    const WeightView like = from.empty() ? WeightView{} : from.front();
    const size_t k = like.k;
    return Block{&from,
                 &to,
                 rows,
                 format_row_bytes(like.format, k),
                 format_scale_bytes(like.format, k),
                 format_scale_rows(like.format)};
  };
  const std::vector<Block> blocks = {block(source.gate, target.gate, share.intermediate),
                                     block(source.up, target.up, share.intermediate),
                                     block(source.down, target.down, share.hidden)};
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
