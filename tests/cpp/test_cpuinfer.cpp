// Does the engine run what is submitted, in order, once, and does every wait end as it should?
#include <doctest/doctest.h>

#include <memory>
#include <mutex>
#include <random>
#include <utility>

#include "runtime/cpuinfer.h"
#include "runtime_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

class LambdaTask : public Task {
 public:
  explicit LambdaTask(std::function<void()> action) : action_(std::move(action)) {}
  void run() override { action_(); }

 private:
  std::function<void()> action_;
};

std::unique_ptr<Task> task(std::function<void()> action) { return std::make_unique<LambdaTask>(std::move(action)); }

std::unique_ptr<Task> failing(const std::string& message) {
  return task([message] { throw std::runtime_error(message); });
}

constexpr bool kNoWake = false;

// A task that begins when it is run and ends when it is let go.
class Gate {
 public:
  std::unique_ptr<Task> task() {
    return ::task([this] {
      begun_ = true;
      becomes_true([this] { return open_.load(); });
    });
  }
  bool wait_until_begun() {
    return becomes_true([this] { return begun_.load(); });
  }
  void open() { open_ = true; }

 private:
  std::atomic<bool> begun_{false}, open_{false};
};

struct Engine : CPUInfer {
  explicit Engine(const std::vector<int>& thread_counts = {2}) : CPUInfer(subpools(thread_counts)) {}
};

std::string sync_error(CPUInfer& engine, uint64_t allow_n_pending = 0) {
  return message_of<std::runtime_error>([&] { engine.sync(allow_n_pending); });
}

std::string wait_error(CPUInfer& engine, uint64_t ticket) {
  return message_of<std::runtime_error>([&] { engine.wait(ticket); });
}

const std::string kNoError = "(no exception)";

}  // namespace

TEST_CASE("engine: tasks run once and in order, with and without a wake-up") {
  for (const bool wake : {true, false}) {
    Engine engine;
    std::vector<int> order;
    for (int i = 0; i < 500; ++i) {
      CHECK(engine.submit(task([&order, i] { order.push_back(i); }), wake) == static_cast<uint64_t>(i + 1));
    }
    engine.sync();
    REQUIRE(order.size() == 500);
    for (int i = 0; i < 500; ++i) CHECK(order[i] == i);
    CHECK(engine.num_submitted() == 500);
    CHECK(engine.num_completed() == 500);
  }
}

TEST_CASE("engine: a submitted task runs although nobody waits, one without wake-up does not") {
  Engine engine;
  engine.submit(task([] {}), kNoWake);
  std::this_thread::sleep_for(milliseconds(20));
  CHECK(engine.num_completed() == 0);
  engine.submit(task([] {}));
  CHECK(becomes_true([&] { return engine.num_completed() == 2; }));
  for (int i = 0; i < 200; ++i) {
    engine.submit(task([] {}));
    CHECK(becomes_true([&] { return engine.num_completed() == engine.num_submitted(); }));
  }
}

TEST_CASE("engine: a synchronous call runs in the calling thread") {
  Engine engine;
  for (int i = 0; i < 100; ++i) {
    std::thread::id ran_in;
    engine.wait(engine.submit(task([&] { ran_in = std::this_thread::get_id(); }), kNoWake));
    CHECK(ran_in == std::this_thread::get_id());
  }
}

TEST_CASE("engine: tasks use the pool") {
  Engine engine({2, 1});
  std::atomic<int> num_runs{0};
  for (int i = 0; i < 100; ++i) {
    engine.submit(task([&] { engine.pool().run(30, [&](const Worker&, int, uint32_t) { ++num_runs; }); }), i % 2 == 0);
  }
  engine.sync();
  CHECK(num_runs == 3000);
  CHECK(engine.backend().get() == &engine.pool());
  CHECK(engine.pool().num_threads() == 3);
}

TEST_CASE("engine: made from a number of threads") {
  CPUInfer engine(3);
  CHECK(engine.pool().num_threads() == 3);
  CHECK(message_of<std::invalid_argument>([] { CPUInfer bad(0); }) == "num_threads is 0, expected at least 1");
}

TEST_CASE("engine: sync(n) leaves n tasks pending") {
  Engine engine;
  for (int i = 0; i < 5; ++i) engine.submit(task([] {}), kNoWake);
  engine.sync(7);
  engine.sync(5);
  CHECK(engine.num_completed() == 0);
  engine.sync(3);
  CHECK(engine.num_completed() == 2);
  engine.sync(1);
  CHECK(engine.num_completed() == 4);
  engine.sync();
  CHECK(engine.num_completed() == 5);
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

TEST_CASE("engine: wait rethrows only its own task's exception, and sync the rest") {
  Engine engine;
  const uint64_t a = engine.submit(failing("a")), b = engine.submit(failing("b")), c = engine.submit(task([] {})),
                 d = engine.submit(failing("d"));
  CHECK(wait_error(engine, c) == kNoError);
  CHECK(wait_error(engine, b) == "b");
  CHECK(wait_error(engine, b) == kNoError);
  CHECK(message_of<std::runtime_error>([&] { engine.wait_for(d, milliseconds(10000)); }) == "d");
  CHECK(sync_error(engine) == "a");
  CHECK(wait_error(engine, a) == kNoError);
}

TEST_CASE("engine: exceptions that nobody fetches do not pile up") {
  Engine engine;
  for (int i = 1; i <= 1500; ++i) engine.submit(failing(std::to_string(i)), kNoWake);
  engine.wait(engine.submit(task([] {}), kNoWake));
  CHECK(sync_error(engine) == "477");  // the first of the newest 1024
  CHECK(sync_error(engine) == kNoError);
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

TEST_CASE("engine: tickets that were never given out") {
  Engine engine;
  CHECK(contains(message_of<std::out_of_range>([&] { engine.wait(1); }), "ticket is 1"));
  engine.submit(task([] {}));
  CHECK(contains(message_of<std::out_of_range>([&] { engine.wait(2); }), "so far 1 to 1"));
  CHECK(contains(message_of<std::out_of_range>([&] { engine.wait_for(0, milliseconds(1)); }), "ticket is 0"));
  CHECK(contains(message_of<std::invalid_argument>([&] { engine.submit(nullptr); }), "task is null"));
}

TEST_CASE("engine: wait_for gives up while another thread has the role") {
  Engine engine;
  Gate gate;
  const uint64_t ticket = engine.submit(gate.task());
  REQUIRE(gate.wait_until_begun());
  const auto begin = std::chrono::steady_clock::now();
  CHECK(!engine.wait_for(ticket, milliseconds(30)));
  CHECK(!engine.wait_for(ticket, milliseconds(0)));
  CHECK(!engine.wait_for(ticket, milliseconds(-5)));
  CHECK(std::chrono::steady_clock::now() - begin >= milliseconds(30));
  gate.open();
  CHECK(engine.wait_for(ticket, milliseconds::max()));
  CHECK(engine.wait_for(ticket, milliseconds(0)));
}

TEST_CASE("engine: wait_for looks at the clock between the tasks that it runs") {
  Engine engine;
  uint64_t ticket = 0;
  for (int i = 0; i < 3; ++i) {
    ticket = engine.submit(task([] { std::this_thread::sleep_for(milliseconds(5)); }), kNoWake);
  }
  CHECK(!engine.wait_for(ticket, milliseconds(1)));
  CHECK(engine.num_completed() == 1);
  CHECK(!engine.wait_for(ticket, milliseconds(0)));
  CHECK(engine.num_completed() == 2);
  CHECK(engine.wait_for(ticket, milliseconds(0)));
}

TEST_CASE("engine: a sleeping waiter takes over when the role becomes free") {
  Engine engine;
  Gate gate;
  const uint64_t first = engine.submit(gate.task(), kNoWake);
  std::thread first_waiter([&] { engine.wait(first); });
  REQUIRE(gate.wait_until_begun());
  std::thread::id ran_in;
  const uint64_t second = engine.submit(task([&] { ran_in = std::this_thread::get_id(); }), kNoWake);
  std::thread second_waiter([&] { engine.wait(second); });
  const std::thread::id expected = second_waiter.get_id();
  let_threads_fall_asleep();
  gate.open();
  first_waiter.join();
  second_waiter.join();
  CHECK(ran_in == expected);
}

TEST_CASE("engine: what a waiter leaves behind goes to the background thread") {
  Engine engine;
  Gate gate;
  const uint64_t first = engine.submit(gate.task(), kNoWake);
  std::thread waiter([&] { engine.wait(first); });
  REQUIRE(gate.wait_until_begun());
  engine.submit(task([] {}));  // asks for the background thread, which cannot have the role yet
  gate.open();
  waiter.join();
  CHECK(becomes_true([&] { return engine.num_completed() == 2; }));
}

TEST_CASE("engine: several threads wait for tasks of their own") {
  Engine engine;
  std::vector<std::thread> threads;
  std::atomic<int> num_right{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 300; ++i) {
        std::atomic<bool> done{false};
        const uint64_t ticket = engine.submit(task([&] { done = true; }), i % 2 == 0);
        engine.wait(ticket);
        if (done) ++num_right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(num_right == 1200);
  CHECK(engine.num_completed() == 1200);
}

TEST_CASE("engine: many producers, each one's tasks in its own order") {
  constexpr int kProducers = 4, kEach = 500;
  Engine engine;
  std::vector<std::vector<int>> order(kProducers);
  std::vector<std::thread> producers;
  for (int producer = 0; producer < kProducers; ++producer) {
    producers.emplace_back([&, producer] {
      for (int i = 0; i < kEach; ++i) {
        engine.submit(task([&order, producer, i] { order[producer].push_back(i); }), i % 3 != 0);
      }
    });
  }
  for (std::thread& producer : producers) producer.join();
  engine.sync();
  for (const std::vector<int>& mine : order) {
    REQUIRE(mine.size() == kEach);
    for (int i = 0; i < kEach; ++i) CHECK(mine[i] == i);
  }
}

TEST_CASE("engine: no wake-up is lost in a random mixture of submitting and waiting") {
  Engine engine;
  std::vector<std::thread> threads;
  std::atomic<int> num_runs{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::minstd_rand random(static_cast<unsigned>(t + 1));
      for (int i = 0; i < 1000; ++i) {
        const auto pauses = random() % 2000;
        const uint64_t ticket = engine.submit(task([&num_runs, pauses] {
                                                for (unsigned p = 0; p < pauses; ++p) cpu_pause();
                                                num_runs.fetch_add(1);
                                              }),
                                              random() % 2 == 0);
        switch (random() % 5) {
          case 0: engine.wait(ticket); break;
          case 1: engine.sync(random() % 3); break;
          case 2: engine.wait_for(ticket, milliseconds(random() % 2)); break;
          case 3: engine.take_finished(); break;
          default: break;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  engine.sync();
  CHECK(num_runs == 4000);
}

TEST_CASE("engine: finished tasks are destroyed by those who take them") {
  struct Counted : Task {
    explicit Counted(std::atomic<int>& num_alive) : num_alive_(num_alive) { ++num_alive_; }
    ~Counted() override { --num_alive_; }
    void run() override {}
    std::atomic<int>& num_alive_;
  };
  std::atomic<int> num_alive{0};
  {
    Engine engine;
    CHECK(engine.take_finished().empty());
    std::vector<Task*> submitted;
    for (int i = 0; i < 10; ++i) {
      auto counted = std::make_unique<Counted>(num_alive);
      submitted.push_back(counted.get());
      engine.submit(std::move(counted));
    }
    engine.sync();
    CHECK(num_alive == 10);
    const std::vector<std::unique_ptr<Task>> finished = engine.take_finished();
    REQUIRE(finished.size() == 10);
    for (size_t i = 0; i < 10; ++i) CHECK(finished[i].get() == submitted[i]);
    CHECK(engine.take_finished().empty());
    for (int i = 0; i < 5; ++i) engine.submit(std::make_unique<Counted>(num_alive), kNoWake);
  }
  CHECK(num_alive == 0);
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
  const uint64_t before = engine.submit(task([] {}));
  engine.submit(task([&] {
    const uint64_t ticket = engine.submit(task([] {}));
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

TEST_CASE("engine: a task may wait for another engine") {
  Engine one, other;
  int num_runs = 0;
  one.wait(one.submit(task([&] { other.wait(other.submit(task([&] { ++num_runs; }), kNoWake)); }), kNoWake));
  CHECK(num_runs == 1);
}

TEST_CASE("engine: idle, it uses no CPU") {
  Engine engine({4});
  engine.submit(task([&] { engine.pool().run(100, [](const Worker&, int, uint32_t) {}); }));
  engine.sync();
  engine.submit(task([] {}), kNoWake);  // left lying is idle too
  let_threads_fall_asleep();
  CHECK(cpu_seconds_while_idle(milliseconds(200)) < 0.02);
}

#if !defined(KT_UNDER_TSAN)
TEST_CASE("engine: a forked child is told, and can make an engine of its own") {
  auto engine = std::make_unique<Engine>();
  engine->submit(task([] {}));
  engine->sync();
  let_threads_fall_asleep();
  const int result = in_forked_child([&] {
    const auto is_told = [](const std::string& message) {
      return contains(message, "forked child") && contains(message, "reset_cpu_infer");
    };
    if (!is_told(message_of<std::runtime_error>([&] { engine->submit(task([] {})); }))) return 1;
    if (!is_told(sync_error(*engine))) return 2;
    if (!is_told(wait_error(*engine, 1))) return 3;
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
      engine->submit(task([&engine] { engine->pool().run(30, [](const Worker&, int, uint32_t) { cpu_pause(); }); }));
    }
    CHECK(in_forked_child([&] {
            engine.reset();
            return 0;
          }) == 0);
    engine->sync();
  }
}
#endif
