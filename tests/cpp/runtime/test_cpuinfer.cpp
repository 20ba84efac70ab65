// Does the engine run what is submitted, in order, once, and does every wait end as it should?
#include <doctest/doctest.h>

#include <random>

#include "engine_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

TEST_CASE("engine: tasks run once and in order, with and without a wake-up") {
  for (const bool wake : {true, false}) {
    Engine engine;
    std::vector<int> order;
    for (int i = 0; i < 500; ++i) {
      const Ticket ticket = engine.submit(task([&order, i] { order.push_back(i); }), wake);
      CHECK(ticket.number() == static_cast<uint64_t>(i + 1));
    }
    engine.sync();
    REQUIRE(order.size() == 500);
    for (int i = 0; i < 500; ++i) CHECK(order[i] == i);
    CHECK(engine.num_submitted() == 500);
    CHECK(engine.num_completed() == 500);
  }
}

TEST_CASE("engine: a submitted task runs without a waiting thread, one without wake-up does not") {
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
    engine.submit(task([&] { engine.pool().run(30, [&](const Worker&, int, uint32_t) { ++num_runs; }); }),
                  i % 2 == 0);
  }
  engine.sync();
  CHECK(num_runs == 3000);
  CHECK(engine.backend().get() == &engine.pool());
  CHECK(engine.pool().num_threads() == 3);
}

TEST_CASE("engine: made from a number of threads") {
  CPUInfer engine(3);
  CHECK(engine.pool().num_threads() == 3);
  CHECK(message_of<std::invalid_argument>([] { CPUInfer bad(0); }) ==
        "num_threads: got 0, expected 1 to 4096");
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

TEST_CASE("engine: wait_for gives up while another thread has the role") {
  Gate gate;
  Engine engine;
  const Ticket ticket = engine.submit(gate.task());
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
  Ticket ticket;
  for (int i = 0; i < 3; ++i) {
    ticket = engine.submit(task([] { std::this_thread::sleep_for(milliseconds(5)); }), kNoWake);
  }
  CHECK(!engine.wait_for(ticket, milliseconds(1)));
  CHECK(engine.num_completed() == 1);
  CHECK(!engine.wait_for(ticket, milliseconds(0)));
  CHECK(engine.num_completed() == 2);
  CHECK(engine.wait_for(ticket, milliseconds(0)));
}

TEST_CASE("engine: a sleeping waiter returns when its task is done, not when the queue is empty") {
  Gate first, second;
  Engine engine;
  const Ticket ticket = engine.submit(first.task());
  engine.submit(second.task());
  REQUIRE(first.wait_until_begun());
  std::atomic<bool> returned{false};
  std::thread waiter([&] {
    engine.wait(ticket);
    returned = true;
  });
  let_threads_fall_asleep();
  first.open();
  CHECK(becomes_true([&] { return returned.load(); }));
  second.open();
  waiter.join();
}

TEST_CASE("engine: a sleeping waiter takes over when the role becomes free") {
  Gate gate;
  Engine engine;
  const Ticket first = engine.submit(gate.task(), kNoWake);
  std::thread first_waiter([&] { engine.wait(first); });
  REQUIRE(gate.wait_until_begun());
  std::thread::id ran_in;
  const Ticket second = engine.submit(task([&] { ran_in = std::this_thread::get_id(); }), kNoWake);
  std::thread second_waiter([&] { engine.wait(second); });
  const std::thread::id expected = second_waiter.get_id();
  let_threads_fall_asleep();
  gate.open();
  first_waiter.join();
  second_waiter.join();
  CHECK(ran_in == expected);
}

TEST_CASE("engine: what a waiter leaves behind goes to the background thread") {
  Gate gate;
  Engine engine;
  const Ticket first = engine.submit(gate.task(), kNoWake);
  std::thread waiter([&] { engine.wait(first); });
  REQUIRE(gate.wait_until_begun());
  engine.submit(task([] {}));  // wakes the background thread, which cannot have the role yet
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
        const Ticket ticket = engine.submit(task([&] { done = true; }), i % 2 == 0);
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
        const Ticket ticket = engine.submit(task([&num_runs, pauses] {
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
