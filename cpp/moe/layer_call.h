// What one forward pass of a layer works on: the caller's arrays, the routing, and the borrowed scratch.
#pragma once

#include <cstddef>
#include <vector>

#include "moe/interface.h"
#include "moe/panel_tasks.h"
#include "moe/routing_plan.h"

namespace ktmoe {

// The activations a worker has packed last: consecutive panels of an expert share them.
struct PackedRows {
  uint32_t active = UINT32_MAX;
  uint32_t m0 = 0;
  kernels::Operand operand;

  // The rows of a task as an operand in `memory`, packed anew only when the expert or the rows change; in
  // int8 for integer products.
  const kernels::Operand& pack_once(const kernels::KernelTable& table, const kernels::RowsView& rows,
                                    const PanelTask& task, uint32_t k, std::byte* memory,
                                    bool in_int8 = false) {
    if (active == task.active && m0 == task.m0) return operand;
    operand = (in_int8 ? table.pack_int8 : table.pack)(rows, task.m1 - task.m0, k, memory);
    active = task.active, m0 = task.m0;
    return operand;
  }
};

// A worker's own scratch.
struct WorkerScratch {
  uint32_t worker = 0;  // its number in the pool
  PackedRows packed;
  std::byte* operand = nullptr;  // packed activations
  float* c_gate = nullptr;       // C blocks
  float* c_up = nullptr;
  std::byte* nt = nullptr;  // of the product kernel
};

// The down projection goes over a part's columns in passes, so that its fp32 results stay in cache until
// they are combined: in pass i, columns [pass.begin, pass.end) are in y, row after row.
struct ColumnPass {
  Span columns;
  float* y = nullptr;
};

struct LayerCall {
  const kernels::KernelTable* kernels = nullptr;
  const GeneralMOEConfig* config = nullptr;
  const ForwardArgs* args = nullptr;
  RoutingPlan plan;
  std::vector<std::byte*> h;  // the intermediate of each active expert: an operand, or rows of bf16
  std::vector<WorkerScratch> workers;
};

}  // namespace ktmoe
