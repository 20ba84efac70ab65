// Reads sysfs and the affinity mask; no library knows more about the few facts that are needed here.
#include "runtime/topology.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <iterator>
#include <limits>
#include <optional>
#include <string_view>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "runtime/cgroup_quota.h"
#include "runtime/system_file.h"

namespace ktmoe {
namespace {

// The kernel's notation for sets: "0-3,8,10-11". A file that is not there is an empty set.
std::vector<int> read_set(const std::string& path) {
  std::vector<int> members;
  const std::string text = read_system_file(path);
  for (std::string_view rest = text; !rest.empty();) {
    std::string_view range = take_until(rest, ',');
    const std::optional<int> first = leading_number<int>(take_until(range, '-'));
    if (!first) continue;
    const int last = leading_number<int>(range).value_or(*first);
    for (int member = *first; member <= last; ++member) members.push_back(member);
  }
  std::sort(members.begin(), members.end());
  return members;
}

std::vector<int> intersection(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> result;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(result));
  return result;
}

std::map<int, std::vector<int>> read_nodes(const std::string& sysfs_root, const std::vector<int>& cpus) {
  std::map<int, std::vector<int>> nodes;
  std::vector<int> unplaced = cpus;
  const std::string directory = sysfs_root + "/devices/system/node";
  for (const int node : read_set(directory + "/online")) {
    std::vector<int> here = intersection(unplaced, read_set(str_cat(directory, "/node", node, "/cpulist")));
    if (here.empty()) continue;
    std::erase_if(unplaced, [&here](int cpu) { return std::binary_search(here.begin(), here.end(), cpu); });
    nodes[node] = std::move(here);
  }
  if (!unplaced.empty()) {
    std::vector<int>& first = nodes.empty() ? nodes[0] : nodes.begin()->second;
    first.insert(first.end(), unplaced.begin(), unplaced.end());
    std::sort(first.begin(), first.end());
  }
  return nodes;
}

// Two hyperthreads share one core's units and caches, so a few threads go on as many cores as they can.
std::vector<int> one_per_core_first(const std::vector<int>& cpus, const std::string& sysfs_root) {
  std::vector<std::pair<ptrdiff_t, int>> ranked;  // (place among the CPUs of its core, CPU)
  for (const int cpu : cpus) {
    const std::string path =
        str_cat(sysfs_root, "/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list");
    const std::vector<int> core = intersection(cpus, read_set(path));
    ranked.emplace_back(std::lower_bound(core.begin(), core.end(), cpu) - core.begin(), cpu);
  }
  std::sort(ranked.begin(), ranked.end());
  std::vector<int> ordered;
  for (const auto& [place, cpu] : ranked) ordered.push_back(cpu);
  return ordered;
}

}  // namespace

std::vector<int> affinity_cpus() {
  // The kernel refuses a set smaller than its own, whose size it does not tell.
  for (int num_cpus = CPU_SETSIZE; num_cpus <= (1 << 20); num_cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(num_cpus);
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(num_cpus);
    CPU_ZERO_S(bytes, set);
    const bool done = sched_getaffinity(0, bytes, set) == 0;
    std::vector<int> cpus;
    for (int cpu = 0; done && cpu < num_cpus; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    }
    CPU_FREE(set);
    if (done) return cpus;
    if (errno != EINVAL) break;
  }
  return {0};
}

Topology Topology::read(const std::string& sysfs_root, const std::string& proc_root,
                        const std::vector<int>& affinity) {
  Topology topology;
  topology.cpus = intersection(affinity, read_set(sysfs_root + "/devices/system/cpu/online"));
  if (topology.cpus.empty()) topology.cpus = affinity;  // no sysfs, as in some sandboxes
  topology.node_cpus = read_nodes(sysfs_root, topology.cpus);
  for (auto& [node, cpus] : topology.node_cpus) cpus = one_per_core_first(cpus, sysfs_root);

  const int num_cpus = static_cast<int>(topology.cpus.size());
  topology.cpu_quota =
      std::max(1, std::min(num_cpus, cgroup_cpu_quota(sysfs_root, proc_root).value_or(num_cpus)));
  return topology;
}

bool bind_memory(void* data, size_t bytes, int node) {
  constexpr int kBitsPerWord = std::numeric_limits<unsigned long>::digits;
  constexpr int kMaxNodes = 1024;  // the most that Linux can be built for
  if (node < 0 || node >= kMaxNodes) return false;
  unsigned long nodes[kMaxNodes / kBitsPerWord] = {};
  nodes[node / kBitsPerWord] = 1ul << (node % kBitsPerWord);

  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = round_up(address, page);
  const uintptr_t end = (address + bytes) / page * page;
  if (begin >= end) return true;
  // Preferred rather than bound: a full node should cost speed, not the process. The kernel reads one bit
  // fewer than it is told of.
  return syscall(SYS_mbind, begin, end - begin, MPOL_PREFERRED, nodes, kMaxNodes + 1, MPOL_MF_MOVE) == 0;
}

}  // namespace ktmoe
