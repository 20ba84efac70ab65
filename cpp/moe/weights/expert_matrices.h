// The weight matrices of a layer, and how a node comes by those rows of them that it computes with.
#pragma once

#include <vector>

#include "formats/format.h"
#include "moe/weights/node_memory.h"
#include "moe/plan/panel_tasks.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// A matrix an expert and projection, each with all its rows as far as anyone reads them.
struct ExpertMatrices {
  std::vector<WeightView> gate, up, down;  // [E]; a layer without a gate has no up
};

// What a part of a layer computes: outputs of gate and up, and of down.
struct OutputShare {
  Span intermediate;
  Span hidden;
};

struct NodeMatrices {
  ExpertMatrices matrices;  // valid for the rows of the share, at their own numbers
  NodeMemory memory;
};

// Copies a share's rows to its node. The pool's threads do it, since the pages lie where they are first
// written.
NodeMatrices copy_to_node(const ExpertMatrices& source, const OutputShare& share, int subpool,
                          WorkerPool& pool);

}  // namespace ktmoe
