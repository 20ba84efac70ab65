// The lock that knows its owner, and objects that a forked child has its own of.
#include "runtime/call_lock.h"

#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/per_process.h"

namespace ktmoe {
namespace {

using Outcome = CallLock::Outcome;

Deadline in(std::chrono::milliseconds time) { return std::chrono::steady_clock::now() + time; }

// Whether a forked child finds so; it has ten seconds.
bool in_child(const std::function<bool()>& check) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(10);
    _exit(check() ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_CASE("call lock: one thread at a time") {
  CallLock lock;
  int count = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 2000; ++n) {
        while (lock.take(in(std::chrono::milliseconds(100))) != Outcome::kTaken) {
        }
        ++count;
        lock.release();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(count == 8000);
}

TEST_CASE("call lock: its owner is told at once, others wait until the deadline") {
  CallLock lock;
  REQUIRE(lock.try_take() == Outcome::kTaken);
  CHECK(lock.try_take() == Outcome::kHeldByThisThread);
  CHECK(lock.take(in(std::chrono::hours(1))) == Outcome::kHeldByThisThread);
  std::thread([&] {
    CHECK(lock.take(in(std::chrono::milliseconds(10))) == Outcome::kTimedOut);
    lock.release();  // not this thread's
    CHECK(lock.try_take() == Outcome::kTimedOut);
  }).join();
  lock.release();
  CHECK(lock.try_take() == Outcome::kTaken);
}

TEST_CASE("call lock: free in a forked child unless the forking thread holds it") {
  CallLock lock, other;
  REQUIRE(lock.try_take() == Outcome::kTaken);
  std::thread([&] {
    CHECK(in_child([&] { return lock.try_take() == Outcome::kTaken; }));
    CHECK(lock.try_take() == Outcome::kTimedOut);
  }).join();
  CHECK(in_child([&] {
    if (lock.try_take() != Outcome::kHeldByThisThread) return false;
    lock.release();
    return lock.try_take() == Outcome::kTaken;
  }));
}

struct Locked {
  std::mutex mutex;
  int number = 0;
};

TEST_CASE("an object of this process: the same in all threads, another in a forked child") {
  Locked& mine = of_this_process<Locked>();
  mine.number = 7;
  std::thread([&] {
    const std::lock_guard held(mine.mutex);
    CHECK(&of_this_process<Locked>() == &mine);
    CHECK(in_child([&] {
      Locked& own = of_this_process<Locked>();
      const std::lock_guard lock(own.mutex);
      return &own != &mine && own.number == 0 && &of_this_process<Locked>() == &own;
    }));
  }).join();
  CHECK(of_this_process<Locked>().number == 7);
}

}  // namespace
}  // namespace ktmoe
