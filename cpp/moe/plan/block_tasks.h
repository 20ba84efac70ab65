// How the work of a layer is cut: into blocks of (rows of one expert) x (outputs).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/contract.h"
#include "moe/plan/routing_plan.h"

namespace ktmoe {

// Outputs or columns [begin, end).
struct Span {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint32_t size() const { return end - begin; }
};

// One task: rows [m0, m1) of an active expert (tokens, for the combination) x outputs [n0, n1).
struct BlockTask {
  uint32_t active;
  uint32_t m0, m1;
  uint32_t n0, n1;
};

// Rows of one expert that are computed at a time when a row has k inputs: as many as fit into L2 beside the
// weights.
uint32_t rows_per_block(uint32_t k);

// The most rows that cut_blocks puts into one block.
uint32_t most_rows_per_block(uint32_t k);

// Bounds on the width of a block of outputs (powers of two), and how many tasks to aim at per thread: enough
// to balance the load, few enough that each is worth its call.
struct BlockWidth {
  uint32_t least = kernels::kOutputBlock / 2;
  uint32_t most = kernels::kMaxCallOutputs;
  uint32_t tasks_per_thread = 24;
};

// Whether a block may have rows with different adapters. Blocks with one each take the same weights of an
// expert one after the other, while these are cached.
enum class BlockAdapters : uint8_t { kAny, kOne };

// Tasks for all active experts x outputs, grouped by expert so that a worker can reuse packed activations.
// Blocks of outputs are as wide as the target number of tasks per thread allows.
void cut_blocks(const RoutingPlan& plan, Span outputs, uint32_t k, int num_threads,
                std::vector<BlockTask>& tasks, BlockWidth block_width = {},
                BlockAdapters adapters = BlockAdapters::kAny);

// Blocks of tokens; when there are few tokens, columns are cut too.
void cut_tokens(uint32_t num_tokens, Span columns, int num_threads, std::vector<BlockTask>& tasks);

// `total` in `parts` parts of nearly equal size, cut at multiples of `multiple`.
Span share_of(uint32_t total, uint32_t multiple, uint32_t part, uint32_t parts);
// The size of the largest part; 0 without parts.
uint32_t widest_share(uint32_t total, uint32_t multiple, uint32_t parts);

}  // namespace ktmoe
