// What the engine does when tasks fail, when it is shut down, misused or forked.
#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "engine_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {
constexpr uint64_t kEverything = std::numeric_limits<uint64_t>::max();
}

TEST_CASE("engine: sync rethrows the first exception and forgets the others it waited for") {
  Engine engine;
  for (const bool wake : {true, false}) {
    engine.submit(task([] {}), wake);
    engine.submit(failing("first"), wake);
    engine.submit(task([] {}), wake);
    engine.submit(failing("second"), wake);
    engine.submit(failing("third"), wake);
    CHECK(sync_error(engine, 1) == "first");
    CHECK(sync_error(engine) == "third");
    CHECK(sync_error(engine) == kNoError);
    engine.submit(task([] {}), wake);
    CHECK(sync_error(engine) == kNoError);
  }
}

TEST_CASE("engine: sync_for gives up in time and rethrows as sync does") {
  Gate gate;
  Engine engine;
  engine.submit(failing("first"));
  const Ticket gated = engine.submit(gate.task());
  engine.submit(failing("last"));
  const auto error_through = [&](uint64_t ticket) {
    return message_of<std::runtime_error>([&] { engine.sync_for(ticket, milliseconds::max()); });
  };
  REQUIRE(gate.wait_until_begun());
  CHECK(!engine.sync_for(gated.number(), milliseconds(5)));
  CHECK(engine.sync_for(0, milliseconds(5)));
  gate.open();
  CHECK(error_through(gated.number()) == "first");
  CHECK(error_through(kEverything) == "last");
  CHECK(error_through(kEverything) == kNoError);
}

TEST_CASE("engine: wait rethrows only its own task's exception, and sync the rest") {
  Engine engine;
  const Ticket a = engine.submit(failing("a")), b = engine.submit(failing("b")),
               c = engine.submit(task([] {})), d = engine.submit(failing("d"));
  CHECK(wait_error(engine, c) == kNoError);
  CHECK(wait_error(engine, b) == "b");
  CHECK(wait_error(engine, b) == "b");  // at every call
  CHECK(message_of<std::runtime_error>([&] { engine.wait_for(d, milliseconds(10000)); }) == "d");
  CHECK(sync_error(engine) == "a");
  CHECK(sync_error(engine) == kNoError);
  CHECK(wait_error(engine, a) == "a");  // even after other calls
}

TEST_CASE("engine: of exceptions that no call fetches, sync keeps the first ones and the last") {
  Engine engine;
  std::vector<Ticket> tickets;
  for (int i = 1; i <= 1500; ++i) tickets.push_back(engine.submit(failing(std::to_string(i)), kNoWake));
  engine.wait(engine.submit(task([] {}), kNoWake));
  CHECK(sync_error(engine, 1501 - 1100) == "1");
  CHECK(sync_error(engine) == "1500");
  CHECK(sync_error(engine) == kNoError);
  // Owners of a ticket get every one.
  for (int i = 1; i <= 1500; ++i)
    CHECK(wait_error(engine, tickets[static_cast<size_t>(i - 1)]) == std::to_string(i));
}

TEST_CASE("engine: an exception in the pool's workers arrives at sync") {
  Engine engine;
  engine.submit(task([&] {
    engine.pool().run(50, [](const Worker&, int, uint32_t n) {
      if (n == 37) throw std::runtime_error("task 37");
    });
  }));
  CHECK(sync_error(engine) == "task 37");
}

TEST_CASE("engine: tickets of other engines, and of none") {
  Engine engine;
  const auto error_of = [&](const Ticket& ticket) {
    return message_of<std::invalid_argument>([&] { engine.wait(ticket); });
  };
  CHECK(contains(error_of(Ticket{}), "got one of another engine"));
  for (int i = 0; i < 20; ++i) {  // one of them may get the address of another
    Ticket other;
    {
      Engine gone;
      other = gone.submit(task([] {}));
    }
    Engine next;
    CHECK(contains(message_of<std::invalid_argument>([&] { next.wait_for(other, milliseconds(1)); }),
                   "got one of another engine"));
  }
  CHECK(contains(message_of<std::invalid_argument>([&] { engine.submit(nullptr); }), "task: got null"));
}

TEST_CASE("engine: shutdown finishes what is queued and refuses more") {
  Engine engine;
  std::atomic<int> num_runs{0};
  for (int i = 0; i < 50; ++i) engine.submit(task([&] { ++num_runs; }), i % 2 == 0);
  engine.submit(failing("kept"), kNoWake);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) threads.emplace_back([&] { engine.shutdown(); });
  for (std::thread& thread : threads) thread.join();
  engine.shutdown();
  CHECK(num_runs == 50);
  CHECK(contains(message_of<std::runtime_error>([&] { engine.submit(task([] {})); }), "shut down"));
  CHECK(sync_error(engine) == "kept");
  CHECK(engine.num_submitted() == 51);
  engine.pool().run(3, [&](const Worker&, int, uint32_t) { ++num_runs; });
  CHECK(num_runs == 53);
}

TEST_CASE("engine: shutdown while others submit") {
  for (int repeat = 0; repeat < 20; ++repeat) {
    Engine engine;
    std::atomic<int> num_runs{0}, num_accepted{0};
    std::thread producer([&] {
      try {
        while (true) {
          engine.submit(task([&] { ++num_runs; }), kNoWake);
          ++num_accepted;
        }
      } catch (const std::runtime_error&) {
      }
    });
    becomes_true([&] { return num_accepted > 10; });
    engine.shutdown();
    producer.join();
    CHECK(num_runs == num_accepted);
  }
}

TEST_CASE("engine: a task may submit, but not wait for its own engine") {
  Engine engine;
  std::string from_task, from_worker, from_shutdown;
  bool done_before = false;
  const Ticket before = engine.submit(task([] {}));
  engine.submit(task([&] {
    const Ticket ticket = engine.submit(task([] {}));
    done_before = engine.wait_for(before, milliseconds(0));
    from_task = wait_error(engine, ticket);
    from_shutdown = message_of<std::runtime_error>([&] { engine.shutdown(); });
    engine.pool().run(1, [&](const Worker&, int, uint32_t) { from_worker = sync_error(engine); });
  }));
  engine.sync();
  CHECK(done_before);
  CHECK(contains(from_task, "own engine"));
  CHECK(contains(from_worker, "own engine"));
  CHECK(contains(from_shutdown, "own engine"));
  CHECK(becomes_true([&] { return engine.num_completed() == 3; }));
}

#if !defined(KT_UNDER_TSAN)
TEST_CASE("engine: a forked child is told, and can make an engine of its own") {
  auto engine = std::make_unique<Engine>();
  const Ticket ticket = engine->submit(task([] {}));
  engine->sync();
  let_threads_fall_asleep();
  const int result = in_forked_child([&] {
    const auto is_told = [](const std::string& message) {
      return contains(message, "forked child") && contains(message, "reset_engine");
    };
    if (!is_told(message_of<std::runtime_error>([&] { engine->submit(task([] {})); }))) return 1;
    if (!is_told(sync_error(*engine))) return 2;
    if (!is_told(wait_error(*engine, ticket))) return 3;
    if (!is_told(message_of<std::runtime_error>([&] { engine->shutdown(); }))) return 4;
    if (engine->take_finished().size() != 1) return 5;
    engine.reset();
    Engine own;
    int num_runs = 0;
    own.submit(task([&] { ++num_runs; }));
    own.sync();
    return num_runs == 1 ? 0 : 6;
  });
  CHECK(result == 0);
  engine->wait(engine->submit(task([] {})));
}
#endif

#if !defined(KT_UNDER_TSAN) && !defined(KT_UNDER_ASAN)
TEST_CASE("engine: a fork in the midst of work leaves a child that can end") {
  for (int repeat = 0; repeat < 20; ++repeat) {
    auto engine = std::make_unique<Engine>(std::vector<int>{3});
    for (int i = 0; i < 50; ++i) {
      engine->submit(
          task([&engine] { engine->pool().run(30, [](const Worker&, int, uint32_t) { cpu_pause(); }); }));
    }
    CHECK(in_forked_child([&] {
            engine.reset();
            return 0;
          }) == 0);
    engine->sync();
  }
}
#endif
