// Keeps the workers, which are pinned, out of the way of the thread that calls them, which is not.
#pragma once

#include <utility>
#include <vector>

#include "runtime/thread.h"

namespace ktmoe {

// With as many workers as CPUs, the scheduler leaves a caller that happens to sit on a worker's CPU there for
// seconds while the CPU kept free for it idles. Measured on two cores: every job takes twice its time. So
// before a job the worker on the caller's CPU is moved to the free one. In the usual case, when the caller is
// where it was at the last job, this costs one look at the current CPU, and else one system call.
class Seating {
 public:
  // `worker_on_cpu[cpu]` is the thread pinned to that CPU, or null. Empty: there are no seats to keep.
  Seating() = default;
  Seating(int free_cpu, std::vector<Thread*> worker_on_cpu)
      : free_cpu_(free_cpu), worker_on_cpu_(std::move(worker_on_cpu)) {}

  void make_way_for_this_thread();

 private:
  int free_cpu_ = -1;
  std::vector<Thread*> worker_on_cpu_;
};

}  // namespace ktmoe
