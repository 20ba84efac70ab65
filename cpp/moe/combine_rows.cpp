#include "moe/combine_rows.h"

#include <vector>

#include "kernels/table.h"
#include "moe/plan/block_tasks.h"

namespace ktmoe {

void combine_rows(const RowSums& sums, WorkerPool& pool) {
  const kernels::KernelTable& kernels = kernels::active_table();
  std::vector<BlockTask> tasks;
  cut_tokens(sums.num_tokens, {0, sums.hidden_size}, pool.num_threads(), tasks);
  const size_t hidden = sums.hidden_size, slots = sums.slots;
  const auto combine = [&](const BlockTask& task) {
    const size_t at = task.m0 * hidden + task.n0;
    kernels::CombineArgs c;
    c.y = sums.rows + task.n0, c.y_stride = hidden;
    c.row = sums.row + task.m0 * slots;
    c.weights = sums.weights ? sums.weights + task.m0 * slots : nullptr;
    c.tokens = task.m1 - task.m0, c.slots = sums.slots, c.columns = task.n1 - task.n0;
    c.hidden = sums.hidden_states + task.m0 * hidden, c.hidden_size = sums.hidden_size;
    const size_t bytes = sums.out_type == kernels::FloatType::kBf16 ? sizeof(bf16) : sizeof(float);
    c.out = static_cast<std::byte*>(sums.out) + at * bytes, c.out_type = sums.out_type;
    c.out_stride = hidden;
    kernels.combine(c);
  };
  constexpr size_t kTiny = 64 << 10;  // values: less than waking the workers takes
  if (sums.num_tokens * slots * hidden < kTiny) {
    for (const BlockTask& task : tasks) combine(task);
    return;
  }
  pool.run(static_cast<uint32_t>(tasks.size()),
           [&](const Worker&, int, uint32_t task) { combine(tasks[task]); });
}

}  // namespace ktmoe
