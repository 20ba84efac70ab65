// How the pool gets on with the rest of the process and the machine: idle, crowded, displaced and forked.
#include <doctest/doctest.h>
#include <sched.h>

#include <memory>

#include "runtime_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

bool works(WorkerPool& pool) {
  std::atomic<int> num_runs{0};
  pool.run(100, [&](const Worker&, int, uint32_t) { ++num_runs; });
  return num_runs == 100;
}

}  // namespace

TEST_CASE("worker pool: an idle pool uses no CPU") {
  WorkerPool pool(subpools({4}));
  CHECK(works(pool));
  let_threads_fall_asleep();
  CHECK(cpu_seconds_while_idle(milliseconds(200)) < 0.02);
}

TEST_CASE("worker pool: as many workers as CPUs, or more, and no job waits for the scheduler") {
  const int num_cpus = Topology::read().cpu_quota;
  for (const int threads : {num_cpus, 4, 2 * num_cpus + 1}) {
    WorkerPool pool(subpools({threads}));
    std::atomic<int> num_runs{0};
    const auto begin = std::chrono::steady_clock::now();
    for (int job = 0; job < 10000; ++job) {
      pool.run(static_cast<uint32_t>(threads), [&](const Worker&, int, uint32_t) { ++num_runs; });
    }
    // A cliff of one scheduler tick (4 ms) a job would take 40 s.
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(8));
    CHECK(num_runs == 10000 * threads);
  }
}

TEST_CASE("worker pool: a worker makes way for the caller on its CPU") {
  const Topology topology = Topology::read();
  const std::vector<int>& cpus = topology.node_cpus.begin()->second;
  if (cpus.size() < 2 || topology.cpu_quota < 2) return;
  cpu_set_t before, other;
  REQUIRE(sched_getaffinity(0, sizeof(before), &before) == 0);
  WorkerPool pool(subpools({2}));
  const auto run_both_at_once = [&] {
    std::atomic<int> num_here{0};
    std::vector<int> cpu_of(2, -1);
    pool.run(2, [&](const Worker& worker, int, uint32_t) {
      num_here.fetch_add(1);
      becomes_true([&] { return num_here == 2; });
      cpu_of[worker.index] = sched_getcpu();
    });
    return cpu_of;
  };
  for (const int cpu : {cpus[1], cpus[0], cpus[1]}) {
    CPU_ZERO(&other);
    CPU_SET(cpu, &other);
    if (sched_setaffinity(0, sizeof(other), &other) != 0) break;
    const std::vector<int> cpu_of = run_both_at_once();
    CHECK(cpu_of[0] == cpu);
    CHECK(cpu_of[1] != cpu);
  }
  sched_setaffinity(0, sizeof(before), &before);
}

#if !defined(KT_UNDER_TSAN)
// The end comes at any moment of a worker's way: between jobs, late for one, about to sleep.
TEST_CASE("worker pool: it ends whatever its workers are about to do") {
  for (int i = 0; i < 6000; ++i) {
    WorkerPool pool(subpools({2 + i % 4}));
    for (int job = 0; job < i % 8; ++job) CHECK(works(pool));
  }
}

TEST_CASE("worker pool: a forked child is told, and can make a pool of its own") {
  auto pool = std::make_unique<WorkerPool>(subpools({3}));
  CHECK(works(*pool));
  const auto nothing = [](const Worker&, int, uint32_t) {};
  let_threads_fall_asleep();
  const int result = in_forked_child([&] {
    if (!contains(message_of<std::runtime_error>([&] { pool->run(3, nothing); }), "forked child")) return 1;
    pool.reset();  // must neither hang nor terminate
    WorkerPool own(subpools({2}));
    return works(own) ? 0 : 2;
  });
  CHECK(result == 0);
  CHECK(works(*pool));
}
#endif
