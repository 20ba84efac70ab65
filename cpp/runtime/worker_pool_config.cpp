// Choosing, checking and placing the workers.
#include "runtime/worker_pool_config.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <string>

#include "core/aligned_buffer.h"
#include "core/error.h"

namespace ktmoe {
namespace {

// More than any machine has CPUs: a slip of the pen should not start them.
constexpr int kMaxThreads = 4096;

std::string node_list(const Topology& topology) {
  std::string text;
  for (const auto& [node, cpus] : topology.node_cpus)
    text += (text.empty() ? "" : ", ") + std::to_string(node);
  return text;
}

void check_size(const char* field, const std::vector<int>& values, int subpool_count) {
  if (values.size() == static_cast<size_t>(subpool_count)) return;
  throw_invalid(field, ": got ", values.size(),
                " entries, expected one for each sub-pool (subpool_count = ", subpool_count, ")");
}

}  // namespace

WorkerPoolConfig WorkerPoolConfig::defaults(const Topology& topology) {
  return with_threads(topology.cpu_quota, topology);
}

WorkerPoolConfig WorkerPoolConfig::with_threads(int num_threads, const Topology& topology) {
  if (num_threads < 1 || num_threads > kMaxThreads)
    throw_invalid("num_threads: got ", num_threads, ", expected 1 to ", kMaxThreads);
  WorkerPoolConfig config;
  const size_t total = static_cast<size_t>(num_threads);
  size_t num_cpus = 0, num_given = 0;
  for (const auto& [node, cpus] : topology.node_cpus) {
    num_cpus += cpus.size();
    const size_t share = div_up(total * num_cpus, topology.cpus.size()) - num_given;
    if (share == 0) continue;
    num_given += share;
    ++config.subpool_count;
    config.subpool_numa_map.push_back(node);
    config.subpool_thread_count.push_back(static_cast<int>(share));
  }
  return config;
}

void WorkerPoolConfig::validate(const Topology& topology) const {
  if (subpool_count < 1) throw_invalid("subpool_count: got ", subpool_count, ", expected at least 1");
  check_size("subpool_numa_map", subpool_numa_map, subpool_count);
  check_size("subpool_thread_count", subpool_thread_count, subpool_count);
  int left = kMaxThreads;
  for (size_t i = 0; i < subpool_thread_count.size(); ++i) {
    if (subpool_thread_count[i] < 1 || subpool_thread_count[i] > left)
      throw_invalid("subpool_thread_count[", i, "]: got ", subpool_thread_count[i], ", expected 1 to ", left);
    left -= subpool_thread_count[i];
  }
  for (size_t i = 0; i < subpool_numa_map.size(); ++i) {
    if (topology.node_cpus.contains(subpool_numa_map[i])) continue;
    throw_invalid("subpool_numa_map[", i, "]: got ", subpool_numa_map[i],
                  ", expected a NUMA node with CPUs that this process may use: ", node_list(topology));
  }
}

int WorkerPoolConfig::num_threads() const {
  return std::accumulate(subpool_thread_count.begin(), subpool_thread_count.end(), 0);
}

bool WorkerPoolConfig::is_crowded(const Topology& topology) const {
  if (num_threads() > topology.cpu_quota) return true;
  std::map<int, int> num_workers;  // of each node
  for (size_t i = 0; i < subpool_numa_map.size(); ++i)
    num_workers[subpool_numa_map[i]] += subpool_thread_count[i];
  return std::any_of(num_workers.begin(), num_workers.end(), [&topology](const auto& entry) {
    const auto& [node, num] = entry;
    return num > static_cast<int>(topology.node_cpus.at(node).size());
  });
}

std::vector<std::vector<CpuSet>> WorkerPoolConfig::assign_cpus(const Topology& topology) const {
  // Under a quota the CPUs are shared with others by time. Fixed ones would be a bad choice there: every
  // container on the machine would choose the same. So each worker gets its node and the scheduler chooses.
  const bool shares_cpus = topology.cpu_quota < static_cast<int>(topology.cpus.size());
  std::map<int, size_t> num_used;  // CPUs of each node; wraps around when there are more workers than CPUs
  std::vector<std::vector<CpuSet>> assigned;
  for (size_t i = 0; i < subpool_numa_map.size(); ++i) {
    const CpuSet& node = topology.node_cpus.at(subpool_numa_map[i]);
    size_t& used = num_used[subpool_numa_map[i]];
    std::vector<CpuSet>& workers = assigned.emplace_back();
    for (int worker = 0; worker < subpool_thread_count[i]; ++worker, ++used) {
      workers.push_back(shares_cpus ? node : CpuSet{node[used % node.size()]});
    }
  }
  return assigned;
}

}  // namespace ktmoe
