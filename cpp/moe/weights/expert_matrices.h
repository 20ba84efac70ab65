// The weight matrices of a layer, and copies of the rows that a NUMA node computes with.
#pragma once

#include <vector>

#include "formats/format.h"
#include "moe/weights/node_memory.h"
#include "moe/plan/block_tasks.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// One matrix per expert and projection. At least the rows that are read are valid.
struct ExpertMatrices {
  std::vector<WeightView> gate, up, down;  // [E]; a layer without a gate has no up
};

// The outputs that a part of a layer computes: of gate and up, and of down.
struct OutputShare {
  Span intermediate;
  Span hidden;
};

struct NodeMatrices {
  ExpertMatrices matrices;  // valid for the rows of the share, at their original indices
  NodeMemory memory;
};

// Copies a share's rows to its node, by the pool's threads: a page is placed on the node that first writes
// it.
NodeMatrices copy_to_node(const ExpertMatrices& source, const OutputShare& share, int subpool,
                          WorkerPool& pool);

}  // namespace ktmoe
