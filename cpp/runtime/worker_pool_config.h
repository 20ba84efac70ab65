// How many workers there are, and on which NUMA nodes.
#pragma once

#include <vector>

#include "runtime/topology.h"

namespace ktmoe {

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

  // For each worker of each sub-pool the CPUs it may run on.
  std::vector<std::vector<std::vector<int>>> assign_cpus(const Topology& topology) const;
};

}  // namespace ktmoe
