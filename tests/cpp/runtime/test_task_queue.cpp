// Does the queue keep every task, its order and its owner, however many threads push?
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "runtime/task_errors.h"
#include "runtime/task_queue.h"
#include "runtime_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

struct Log {
  std::vector<std::pair<int, int>> runs;  // (producer, its number)
  std::atomic<int> num_destroyed{0};
};

class LoggedTask : public Task {
 public:
  LoggedTask(Log& log, int producer, int number) : log_(log), producer_(producer), number_(number) {}
  ~LoggedTask() override { log_.num_destroyed.fetch_add(1); }
  void run() override { log_.runs.emplace_back(producer_, number_); }

 private:
  Log& log_;
  int producer_, number_;
};

}  // namespace

TEST_CASE("task queue: one producer") {
  Log log;
  TaskQueue queue;
  CHECK(queue.pop() == nullptr);
  for (int i = 0; i < 10; ++i) {
    CHECK(queue.push(std::make_unique<LoggedTask>(log, 0, i)) == static_cast<uint64_t>(i + 1));
    if (i % 3 == 0) queue.pop()->run();
  }
  CHECK(queue.num_pushed() == 10);
  while (const std::unique_ptr<Task> task = queue.pop()) task->run();
  REQUIRE(log.runs.size() == 10);
  for (int i = 0; i < 10; ++i) CHECK(log.runs[i] == std::pair(0, i));
  CHECK(log.num_destroyed == 10);
}

TEST_CASE("task queue: many producers while the consumer runs") {
  constexpr int kProducers = 4, kEach = 3000;
  Log log;
  TaskQueue queue;
  std::vector<std::vector<uint64_t>> tickets(kProducers);
  std::vector<std::thread> producers;
  for (int producer = 0; producer < kProducers; ++producer) {
    producers.emplace_back([&, producer] {
      for (int i = 0; i < kEach; ++i) {
        tickets[producer].push_back(queue.push(std::make_unique<LoggedTask>(log, producer, i)));
      }
    });
  }
  const bool in_time = becomes_true([&] {
    while (const std::unique_ptr<Task> task = queue.pop()) task->run();
    return log.runs.size() == kProducers * kEach;
  });
  for (std::thread& producer : producers) producer.join();
  REQUIRE(in_time);

  // The ticket is the place in the order of execution.
  bool in_place = true;
  for (int producer = 0; producer < kProducers; ++producer) {
    for (int i = 0; i < kEach; ++i) {
      in_place = in_place && log.runs.at(tickets[producer][i] - 1) == std::pair(producer, i);
    }
    CHECK(std::is_sorted(tickets[producer].begin(), tickets[producer].end()));
  }
  CHECK(in_place);
}

TEST_CASE("task queue: closed, it takes nothing more and still gives what it has") {
  Log log;
  TaskQueue queue;
  queue.push(std::make_unique<LoggedTask>(log, 0, 0));
  CHECK(queue.close() == 1);
  CHECK(queue.close() == 1);
  CHECK(contains(message_of<std::runtime_error>([&] { queue.push(std::make_unique<LoggedTask>(log, 0, 1)); }),
                 "shut down"));
  CHECK(queue.num_pushed() == 1);
  CHECK(queue.pop() != nullptr);
  CHECK(queue.pop() == nullptr);
}

TEST_CASE("task queue: destroys tasks that were not taken") {
  Log log;
  {
    TaskQueue queue;
    for (int i = 0; i < 5; ++i) queue.push(std::make_unique<LoggedTask>(log, 0, i));
    queue.pop();  // leaves some sorted
    for (int i = 5; i < 8; ++i) queue.push(std::make_unique<LoggedTask>(log, 0, i));
  }
  CHECK(log.num_destroyed == 8);
  CHECK(log.runs.empty());
}

TEST_CASE("task queue: the consumer role is one thread's at a time") {
  TaskQueue queue;
  CHECK(queue.is_role_free());
  CHECK(queue.try_acquire_role());
  CHECK(!queue.is_role_free());
  CHECK(!queue.try_acquire_role());
  queue.release_role();
  CHECK(queue.try_acquire_role());
}

namespace {

int number(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (int value) {
    return value;
  }
  return 0;
}

}  // namespace

TEST_CASE("task errors: the first of those waited for is handed out, and none that is forgotten") {
  TaskErrors errors;
  errors.forget(1);
  CHECK(errors.take_first_through(100) == nullptr);
  for (const int ticket : {2, 3, 5, 8, 9}) {
    errors.add(static_cast<uint64_t>(ticket), std::make_exception_ptr(ticket));
  }
  errors.forget(2);
  errors.forget(4);
  CHECK(errors.take_first_through(1) == nullptr);
  CHECK(number(errors.take_first_through(8)) == 3);  // 5 and 8 are forgotten
  CHECK(number(errors.take_first_through(100)) == 9);
  CHECK(errors.take_first_through(100) == nullptr);
}

TEST_CASE("task errors: of more than 1024 the first ones are kept, and the last") {
  TaskErrors errors;
  for (int ticket = 1; ticket <= 1500; ++ticket)
    errors.add(static_cast<uint64_t>(ticket), std::make_exception_ptr(ticket));
  for (int ticket = 1; ticket <= 1023; ++ticket)
    CHECK(number(errors.take_first_through(static_cast<uint64_t>(ticket))) == ticket);
  CHECK(errors.take_first_through(1499) == nullptr);
  CHECK(number(errors.take_first_through(1500)) == 1500);
}
