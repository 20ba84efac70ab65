// How many workers there are, and on which NUMA nodes.
#pragma once

#include <vector>

#include "runtime/topology.h"

namespace ktmoe {

using CpuSet = std::vector<int>;

struct WorkerPoolConfig {
  int subpool_count = 0;
  std::vector<int> subpool_numa_map;      // the node of each sub-pool; several may share one
  std::vector<int> subpool_thread_count;  // the workers of each sub-pool

  // One sub-pool for each node with CPUs that may be used, a worker for each of those, in all at most
  // cpu_quota.
  static WorkerPoolConfig defaults(const Topology& topology);

  // Like defaults() with `num_threads` workers in all, spread in proportion to the nodes' CPUs.
  static WorkerPoolConfig with_threads(int num_threads, const Topology& topology);

  // Throws invalid_argument, naming the field, unless a pool can be made on this machine. More workers than
  // CPUs are allowed: they share.
  void validate(const Topology& topology) const;

  int num_threads() const;

  // True when some workers have to share a CPU: a node has more than it has CPUs, or all have more than the
  // quota.
  bool is_crowded(const Topology& topology) const;

  // For each worker of each sub-pool the CPUs it may run on.
  std::vector<std::vector<CpuSet>> assign_cpus(const Topology& topology) const;
};

}  // namespace ktmoe
