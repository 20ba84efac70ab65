// Are the workers chosen and placed sensibly, and is what cannot be refused by name?
#include <doctest/doctest.h>

#include "runtime_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

TEST_CASE("worker pool config: defaults") {
  Topology topology;
  topology.cpus = {0, 1, 2, 3, 4, 5, 6, 7};
  topology.node_cpus = {{0, {0, 1, 2, 3, 4, 5}}, {3, {6, 7}}};
  topology.cpu_quota = 8;
  const auto check = [](const WorkerPoolConfig& config, const std::vector<int>& nodes,
                        const std::vector<int>& threads) {
    CHECK(config.subpool_count == static_cast<int>(nodes.size()));
    CHECK(config.subpool_numa_map == nodes);
    CHECK(config.subpool_thread_count == threads);
  };
  check(WorkerPoolConfig::defaults(topology), {0, 3}, {6, 2});
  check(WorkerPoolConfig::with_threads(16, topology), {0, 3}, {12, 4});
  topology.cpu_quota = 4;
  check(WorkerPoolConfig::defaults(topology), {0, 3}, {3, 1});
  topology.cpu_quota = 1;
  check(WorkerPoolConfig::defaults(topology), {0}, {1});
  CHECK(message_of<std::invalid_argument>([&] { WorkerPoolConfig::with_threads(0, topology); }) ==
        "num_threads: got 0, expected 1 to 4096");
  CHECK(message_of<std::invalid_argument>([&] { WorkerPoolConfig::with_threads(4097, topology); }) ==
        "num_threads: got 4097, expected 1 to 4096");
}

TEST_CASE("worker pool config: sub-pools of one node get CPUs of their own while there are some") {
  Topology topology;
  topology.cpus = {0, 1, 2, 3, 4, 5};
  topology.node_cpus = {{0, {0, 2, 1, 3}}, {1, {4, 5}}};
  topology.cpu_quota = 6;
  const WorkerPoolConfig config{3, {0, 1, 0}, {2, 3, 3}};
  using Cpus = std::vector<std::vector<int>>;
  CHECK(config.assign_cpus(topology) == std::vector<Cpus>{{{0}, {2}}, {{4}, {5}, {4}}, {{1}, {3}, {0}}});
  CHECK(config.is_crowded(topology));
  CHECK(WorkerPoolConfig{3, {0, 1, 0}, {2, 3, 1}}.is_crowded(topology));  // node 1 is
  CHECK(!WorkerPoolConfig{3, {0, 1, 0}, {2, 2, 2}}.is_crowded(topology));
  topology.cpu_quota = 3;
  CHECK(WorkerPoolConfig{2, {0, 1}, {2, 2}}.is_crowded(topology));
  CHECK(config.assign_cpus(topology)[1] == Cpus{{4, 5}, {4, 5}, {4, 5}});
}

TEST_CASE("worker pool config: what cannot be is refused by name") {
  Topology topology;
  topology.cpus = {0, 1, 2, 3};
  topology.node_cpus = {{0, {0, 1}}, {2, {2, 3}}};
  topology.cpu_quota = 4;
  const auto refusal = [&](const WorkerPoolConfig& config) {
    return message_of<std::invalid_argument>([&] { WorkerPool pool(config, topology); });
  };
  CHECK(refusal({}) == "subpool_count: got 0, expected at least 1");
  CHECK(refusal({-1, {}, {}}) == "subpool_count: got -1, expected at least 1");
  CHECK(refusal({2, {0}, {1, 1}}) ==
        "subpool_numa_map: got 1 entries, expected one for each sub-pool (subpool_count = 2)");
  CHECK(refusal({1, {0}, {1, 1}}) ==
        "subpool_thread_count: got 2 entries, expected one for each sub-pool (subpool_count = 1)");
  CHECK(refusal({2, {0, 2}, {1, 0}}) == "subpool_thread_count[1]: got 0, expected 1 to 4095");
  CHECK(refusal({1, {0}, {-3}}) == "subpool_thread_count[0]: got -3, expected 1 to 4096");
  CHECK(refusal({2, {0, 2}, {4000, 100}}) == "subpool_thread_count[1]: got 100, expected 1 to 96");
  CHECK(refusal({2, {0, 1}, {1, 1}}) ==
        "subpool_numa_map[1]: got 1, expected a NUMA node with CPUs that this process may use: 0, 2");
}
