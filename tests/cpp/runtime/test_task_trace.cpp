// Does a timeline keep what was added, by track, and count what it has no room for?
#include "runtime/task_trace.h"

#include <doctest/doctest.h>

#include <string>
#include <thread>
#include <vector>

using namespace ktmoe;

TEST_CASE("a timeline has its spans by worker, phases first") {
  TaskTrace trace(2);
  trace.add({"down", 3, 1, 5, 10, 20});
  trace.add({"gate_up", 3, 0, 4, 1, 2});
  trace.add({"down", 3, TaskTrace::kPhase, 0, 9, 21});
  trace.add({"gate_up", 3, 0, 6, 2, 3});
  std::vector<std::string> found;
  for (const TaskTrace::Span& span : trace.spans())
    found.push_back(span.name + std::to_string(span.task) + ":" + std::to_string(span.end_ns));
  CHECK(found == std::vector<std::string>{"down0:21", "gate_up4:2", "gate_up6:3", "down5:20"});
  CHECK(trace.num_dropped() == 0);
}

TEST_CASE("a timeline that is full counts the rest") {
  TaskTrace trace(3, 2);
  for (uint32_t i = 0; i < 5; ++i) trace.add({"down", 0, 1, i, 0, 0});
  for (uint32_t i = 0; i < 3; ++i) trace.add({"down", 0, TaskTrace::kPhase, i, 0, 0});
  trace.add({"down", 0, 2, 0, 0, 0});
  CHECK(trace.spans().size() == 5);
  CHECK(trace.num_dropped() == 4);
}

TEST_CASE("workers and phases are recorded from many threads") {
  constexpr uint32_t kWorkers = 4, kSpans = 1000;
  TaskTrace trace(kWorkers);
  std::vector<std::thread> threads;
  for (uint32_t worker = 0; worker < kWorkers; ++worker)
    threads.emplace_back([&trace, worker] {
      for (uint32_t i = 0; i < kSpans; ++i) {
        trace.add({"down", 0, worker, i, 0, 0});
        trace.add({"down", 0, TaskTrace::kPhase, i, 0, 0});
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(trace.spans().size() == 2 * kWorkers * kSpans);
}
