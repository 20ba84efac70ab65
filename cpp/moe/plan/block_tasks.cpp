#include "moe/plan/block_tasks.h"

#include <algorithm>

#include "core/aligned_buffer.h"

namespace ktmoe {
namespace {

// Equal blocks of about `target` rows, in multiples of kOutputBlock. Up to 1.5 times `target` stay in one
// block: reading the weights again costs more than activations that do not quite fit the cache.
uint32_t row_block(uint32_t rows, uint32_t target) {
  const size_t blocks = rows <= target / 2 * 3 ? 1 : div_up(rows - target / 2, target);
  return static_cast<uint32_t>(round_up(div_up(rows, blocks), kernels::kOutputBlock));
}

}  // namespace

uint32_t most_rows_per_block(uint32_t k) {
  return static_cast<uint32_t>(round_up(rows_per_block(k) / 2 * 3, kernels::kOutputBlock));
}

uint32_t rows_per_block(uint32_t k) {
  constexpr uint32_t kCacheBytes = 1u << 20;
  const uint32_t rows =
      kCacheBytes / (k * static_cast<uint32_t>(sizeof(bf16))) / kernels::kOutputBlock * kernels::kOutputBlock;
  return std::clamp(rows, kernels::kOutputBlock, kernels::kMaxCallRows / 3 * 2);
}

void cut_blocks(const RoutingPlan& plan, Span outputs, uint32_t k, int num_threads,
                std::vector<BlockTask>& tasks, BlockWidth block_width, BlockAdapters adapters) {
  tasks.clear();
  const uint32_t target = rows_per_block(k);
  size_t row_blocks = 0;
  for (const auto& expert : plan.active) row_blocks += div_up(expert.rows, row_block(expert.rows, target));

  uint32_t width = block_width.most;
  const size_t wanted = size_t{block_width.tasks_per_thread} * static_cast<size_t>(num_threads);
  while (width > block_width.least && row_blocks * div_up(outputs.size(), width) < wanted) width /= 2;

  const auto add = [&](uint32_t a, uint32_t m0, uint32_t m1, uint32_t n0, uint32_t n1) {
    const uint32_t block = row_block(m1 - m0, target);
    for (uint32_t m = m0; m < m1; m += block)
      for (uint32_t n = n0; n < n1; n += width)
        tasks.push_back({a, m, std::min(m + block, m1), n, std::min(n + width, n1)});
  };
  if (adapters == BlockAdapters::kAny || plan.adapted.empty()) {
    for (uint32_t a = 0; a < plan.active.size(); ++a)
      add(a, 0, plan.active[a].rows, outputs.begin, outputs.end);
    return;
  }
  auto first = plan.adapted.begin();
  for (uint32_t a = 0; a < plan.active.size(); ++a) {
    const uint32_t begin = plan.active[a].begin, end = begin + plan.active[a].rows;
    const auto behind =
        std::find_if(first, plan.adapted.end(), [&](const auto& rows) { return rows.begin >= end; });
    for (uint32_t n = outputs.begin; n < outputs.end; n += width)
      for (auto rows = first; rows != behind; ++rows)
        add(a, rows->begin - begin, rows->begin - begin + rows->rows, n, std::min(n + width, outputs.end));
    first = behind;
  }
}

void cut_tokens(uint32_t num_tokens, Span columns, int num_threads, std::vector<BlockTask>& tasks) {
  tasks.clear();
  constexpr uint32_t kColumns = 512;
  const size_t wanted = size_t{4} * static_cast<size_t>(num_threads);
  const uint32_t rows = static_cast<uint32_t>(std::clamp<size_t>(num_tokens / wanted, 1, 64));
  const uint32_t width = num_tokens < wanted ? kColumns : std::max(columns.size(), 1u);
  for (uint32_t t = 0; t < num_tokens; t += rows)
    for (uint32_t c = columns.begin; c < columns.end; c += width)
      tasks.push_back({0, t, std::min(t + rows, num_tokens), c, std::min(c + width, columns.end)});
}

Span share_of(uint32_t total, uint32_t multiple, uint32_t part, uint32_t parts) {
  const auto cut = [&](uint32_t i) {
    const size_t units = div_up(total, multiple);
    return static_cast<uint32_t>(std::min<size_t>(units * i / parts * multiple, total));
  };
  return {cut(part), cut(part + 1)};
}

uint32_t widest_share(uint32_t total, uint32_t multiple, uint32_t parts) {
  uint32_t widest = 0;
  for (uint32_t i = 0; i < parts; ++i) widest = std::max(widest, share_of(total, multiple, i, parts).size());
  return widest;
}

}  // namespace ktmoe
