// Does every task run exactly once, on any thread, with any pool, and with any failure?
#include <doctest/doctest.h>

#include <cmath>

#include "runtime_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

using Counts = std::vector<uint32_t>;

// How often each task of each sub-pool ran.
class Tally {
 public:
  explicit Tally(const Counts& num_tasks) {
    for (const uint32_t num : num_tasks) runs_.emplace_back(num);
  }
  void add(int subpool, uint32_t task) { runs_.at(subpool).at(task).fetch_add(1); }
  bool all_are(int expected) const {
    for (const auto& subpool : runs_) {
      for (const auto& runs : subpool) {
        if (runs.load() != expected) return false;
      }
    }
    return true;
  }

 private:
  std::vector<std::vector<std::atomic<int>>> runs_;
};

void check_every_task_runs_once(WorkerPool& pool, const Counts& num_tasks) {
  Tally tally(num_tasks);
  std::atomic<bool> workers_fit{true};
  pool.run(num_tasks, [&](const Worker& worker, int subpool, uint32_t task) {
    tally.add(subpool, task);
    if (worker.index < 0 || worker.index >= pool.num_threads()) workers_fit = false;
    if (worker.subpool < 0 || worker.subpool >= pool.num_subpools()) workers_fit = false;
  });
  CHECK(tally.all_are(1));
  CHECK(workers_fit.load());
}

// Two nodes, whatever the machine has; the second one's CPU is the first's if there is only one.
Topology two_nodes() {
  Topology topology = Topology::read();
  const int first = topology.cpus.front(), last = topology.cpus.back();
  topology.node_cpus = {{0, {first}}, {1, {last}}};
  return topology;
}

void check_pool_works(WorkerPool& pool) {
  check_every_task_runs_once(pool, Counts(static_cast<size_t>(pool.num_subpools()), 50));
}

}  // namespace

TEST_CASE("worker pool: every task runs exactly once") {
  for (const std::vector<int>& threads :
       std::vector<std::vector<int>>{{1}, {2}, {3}, {4}, {1, 1}, {2, 3}, {2, 1, 2}}) {
    WorkerPool pool(subpools(threads));
    for (const uint32_t num : {0u, 1u, 2u, 3u, 7u, 64u, 1000u}) {
      Counts even(threads.size(), num), one_sided(threads.size(), 0);
      one_sided.back() = num;
      for (int repeat = 0; repeat < 20; ++repeat) {
        check_every_task_runs_once(pool, even);
        check_every_task_runs_once(pool, one_sided);
      }
    }
  }
}

TEST_CASE("worker pool: tasks numbered throughout are shared as the threads are") {
  WorkerPool pool(subpools({1, 3}));
  for (const uint32_t num : {0u, 1u, 3u, 4u, 10u, 1000u}) {
    std::vector<std::atomic<int>> runs(num);
    std::vector<int> subpool_of(num);
    pool.run(num, [&](const Worker&, int subpool, uint32_t task) {
      runs.at(task).fetch_add(1);
      subpool_of.at(task) = subpool;
    });
    for (uint32_t task = 0; task < num; ++task) {
      CHECK(runs[task].load() == 1);
      CHECK(subpool_of[task] == (task < num / 4 ? 0 : 1));
    }
  }
}

TEST_CASE("worker pool: one task much longer than all others together") {
  WorkerPool pool(subpools({3}));
  for (const uint32_t long_task : {0u, 50u, 99u}) {
    Tally tally({100});
    pool.run(100, [&](const Worker&, int subpool, uint32_t task) {
      if (task == long_task) std::this_thread::sleep_for(milliseconds(20));
      tally.add(subpool, task);
    });
    CHECK(tally.all_are(1));
  }
}

TEST_CASE("worker pool: the range of a busy worker is stolen") {
  WorkerPool pool(subpools({2}));
  std::atomic<uint32_t> num_done{0};
  std::vector<int> ran_by(20, -1);
  bool in_time = true;
  // Of the two ranges the first is the caller's. Its first task ends when all other tasks have.
  pool.run(20, [&](const Worker& worker, int, uint32_t task) {
    ran_by[task] = worker.index;
    if (task == 0) in_time = becomes_true([&] { return num_done == 19; });
    num_done.fetch_add(1);
  });
  CHECK(in_time);
  CHECK(ran_by[0] == 0);
  for (uint32_t task = 1; task < 20; ++task) CHECK(ran_by[task] == 1);
}

TEST_CASE("worker pool: a sub-pool without work helps another on its node") {
  WorkerPool pool(subpools({1, 1}));
  std::atomic<uint32_t> num_done{0};
  std::vector<Worker> ran_by(10);
  bool in_time = true, subpool_is_the_tasks = true;
  const Counts num_tasks{10, 0};
  pool.run(num_tasks, [&](const Worker& worker, int subpool, uint32_t task) {
    ran_by[task] = worker;
    if (task == 0) {
      in_time = becomes_true([&] { return num_done == 9; });
      subpool_is_the_tasks = subpool == 0;
    }
    num_done.fetch_add(1);
  });
  CHECK(in_time);
  CHECK(subpool_is_the_tasks);
  for (uint32_t task = 1; task < 10; ++task) {
    CHECK(ran_by[task].index == 1);
    CHECK(ran_by[task].subpool == 1);
  }
}

TEST_CASE("worker pool: no two threads are the same worker at once") {
  WorkerPool pool(subpools({2, 2}));
  std::vector<std::atomic<bool>> busy(4);
  std::atomic<bool> clash{false};
  for (int repeat = 0; repeat < 200; ++repeat) {
    pool.run(100, [&](const Worker& worker, int, uint32_t) {
      if (busy.at(worker.index).exchange(true)) clash = true;
      busy.at(worker.index) = false;
    });
  }
  CHECK(!clash.load());
}

TEST_CASE("worker pool: results do not depend on the number of threads") {
  std::vector<double> expected;
  for (const int threads : {1, 2, 4}) {
    WorkerPool pool(subpools({threads}));
    std::vector<double> result(500);
    pool.run(500, [&](const Worker&, int, uint32_t task) { result[task] = std::sin(0.1 * task); });
    if (expected.empty()) expected = result;
    CHECK(result == expected);
  }
}

TEST_CASE("worker pool: two nodes, and workers that never come") {
  WorkerPool pool({2, {0, 1}, {2, 2}}, two_nodes());
  CHECK(pool.numa_node(1) == 1);
  for (const Counts& num_tasks : {Counts{100, 100}, Counts{0, 100}, Counts{100, 0}, Counts{0, 1}}) {
    for (int repeat = 0; repeat < 50; ++repeat) check_every_task_runs_once(pool, num_tasks);
  }
  pool.stop();  // from here on the caller is alone
  for (const Counts& num_tasks : {Counts{100, 100}, Counts{0, 100}, Counts{100, 0}}) {
    check_every_task_runs_once(pool, num_tasks);
  }
  int num_inner = 0;
  pool.run(10, [&](const Worker&, int, uint32_t) {
    pool.run(3, [&](const Worker&, int, uint32_t) { ++num_inner; });
  });
  CHECK(num_inner == 30);
}

TEST_CASE("worker pool: an exception at any task reaches the caller, and the pool goes on") {
  for (const std::vector<int>& threads : std::vector<std::vector<int>>{{1}, {2}, {4}, {1, 2}}) {
    WorkerPool pool(subpools(threads));
    for (uint32_t bad = 0; bad < 30; ++bad) {
      std::atomic<int> num_begun{0};
      const auto fn = [&](const Worker&, int, uint32_t task) {
        num_begun.fetch_add(1);
        if (task == bad) throw std::out_of_range("task " + std::to_string(task));
      };
      CHECK(message_of<std::out_of_range>([&] { pool.run(30, fn); }) == "task " + std::to_string(bad));
      if (pool.num_threads() == 1) CHECK(num_begun == static_cast<int>(bad) + 1);
      CHECK(num_begun <= 30);
    }
    check_pool_works(pool);
  }
}

TEST_CASE("worker pool: an exception of the worker that is not the caller") {
  WorkerPool pool(subpools({2}));
  std::atomic<bool> worker_threw{false};
  const auto fn = [&](const Worker& worker, int, uint32_t) {
    if (worker.index == 0) {
      becomes_true([&] { return worker_threw.load(); });
    } else if (!worker_threw.exchange(true)) {
      throw std::runtime_error("from the worker");
    }
  };
  CHECK(message_of<std::runtime_error>([&] { pool.run(100, fn); }) == "from the worker");
  check_pool_works(pool);
}

TEST_CASE("worker pool: when all tasks throw, one exception arrives") {
  WorkerPool pool(subpools({4}));
  for (int repeat = 0; repeat < 100; ++repeat) {
    CHECK_THROWS_AS(pool.run(40, [](const Worker&, int, uint32_t task) { throw task; }), uint32_t);
  }
  check_pool_works(pool);
}

TEST_CASE("worker pool: run_inline stays in the calling thread") {
  WorkerPool pool(subpools({2, 1}));
  Tally tally({5, 7});
  bool only_here = true;
  const Counts num_tasks{5, 7};
  pool.run_inline(num_tasks,
                  [&, here = std::this_thread::get_id()](const Worker& worker, int subpool, uint32_t task) {
                    tally.add(subpool, task);
                    only_here = only_here && worker.index == 0 && std::this_thread::get_id() == here;
                  });
  CHECK(tally.all_are(1));
  CHECK(only_here);
  CHECK_THROWS_AS(pool.run_inline(num_tasks, [](const Worker&, int, uint32_t) { throw 1; }), int);
  check_pool_works(pool);
}

TEST_CASE("worker pool: a task that calls run() runs it itself") {
  WorkerPool pool(subpools({2, 2}));
  std::atomic<int> num_inner{0};
  std::atomic<bool> same_worker{true};
  const Counts two_each{2, 2};
  CHECK(!pool.is_inside_task());
  pool.run(20, [&](const Worker& outer, int, uint32_t) {
    if (!pool.is_inside_task()) same_worker = false;
    const auto inner_fn = [&](const Worker& inner, int, uint32_t) {
      if (inner.index != outer.index || inner.subpool != outer.subpool) same_worker = false;
      num_inner.fetch_add(1);
    };
    pool.run(3, inner_fn);
    pool.run(two_each, inner_fn);
    pool.run_inline(two_each, inner_fn);
  });
  CHECK(num_inner == 20 * (3 + 4 + 4));
  CHECK(same_worker.load());
  CHECK(!pool.is_inside_task());
}

TEST_CASE("worker pool: a task may use another pool, and that one the first again") {
  WorkerPool first(subpools({1})), second(subpools({1}));
  int num_runs = 0;
  first.run(2, [&](const Worker&, int, uint32_t) {
    second.run(2, [&](const Worker&, int, uint32_t) {
      first.run(2, [&](const Worker&, int, uint32_t) { ++num_runs; });
    });
  });
  CHECK(num_runs == 8);
}

TEST_CASE("worker pool: callers in several threads take turns") {
  WorkerPool pool(subpools({2}));
  std::atomic<int> num_runs{0};
  std::vector<std::atomic<bool>> busy(2);
  std::atomic<bool> overlap{false};
  const auto caller_main = [&] {
    for (int repeat = 0; repeat < 200; ++repeat) {
      pool.run(10, [&](const Worker& worker, int, uint32_t) {
        if (busy.at(worker.index).exchange(true)) overlap = true;
        num_runs.fetch_add(1);
        busy.at(worker.index) = false;
      });
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(caller_main);
  for (std::thread& caller : callers) caller.join();
  CHECK(num_runs == 3 * 200 * 10);
  CHECK(!overlap.load());
}

TEST_CASE("worker pool: num_tasks must fit the pool") {
  WorkerPool pool(subpools({1, 1}));
  const auto nothing = [](const Worker&, int, uint32_t) {};
  CHECK(message_of<std::invalid_argument>([&] { pool.run(Counts{1}, nothing); }) ==
        "num_tasks: got 1 entries, expected one for each of the 2 sub-pools");
  CHECK(message_of<std::invalid_argument>([&] { pool.run(Counts{0x80000000u, 0x80000000u}, nothing); }) ==
        "num_tasks: got 4294967296 in all, expected at most 4294967295");
}
