// The exchange of seats between the caller and a worker.
#include "runtime/seating.h"

#include <sched.h>

namespace ktmoe {

void Seating::make_way_for_this_thread() {
  const int cpu = sched_getcpu();
  if (cpu < 0 || cpu == free_cpu_ || cpu >= static_cast<int>(worker_on_cpu_.size())) return;
  Thread* worker = worker_on_cpu_[cpu];
  if (worker == nullptr || !worker->pin({free_cpu_})) return;
  std::swap(worker_on_cpu_[cpu], worker_on_cpu_[free_cpu_]);
  free_cpu_ = cpu;
}

}  // namespace ktmoe
