// The CPUs that this process may use, their NUMA nodes, and placement of memory on a node.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace ktmoe {

// The CPUs in the affinity mask of the calling thread, ascending.
std::vector<int> affinity_cpus();

struct Topology {
  std::vector<int> cpus;  // that may be used: in the affinity mask and online; ascending

  // NUMA node -> its CPUs among `cpus`, in the order in which to fill them: one of each physical core, then
  // the hyperthreads beside those. A node without a CPU that may be used is not listed.
  std::map<int, std::vector<int>> node_cpus;

  int cpu_quota =
      1;  // CPUs' worth of time: the number of `cpus`, or fewer where a control group grants fewer

  // A machine without NUMA information is one node 0. Tests pass an imitation of the two roots.
  static Topology read(const std::string& sysfs_root = "/sys", const std::string& proc_root = "/proc",
                       const std::vector<int>& affinity = affinity_cpus());
};

// Makes the kernel keep the pages of [data, data + bytes) on `node` while it has room, and moves pages from
// other nodes. Pages that are only partly in the range are not changed. False when the kernel
// refused.
bool bind_memory(void* data, size_t bytes, int node);

}  // namespace ktmoe
