// What the tests of the runtime share: small pools, waiting with a limit, and a child process with a limit.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "runtime/worker_pool.h"

// The sanitizers' own locks do not survive a fork: ThreadSanitizer's never, AddressSanitizer's only if no
// other thread is allocating at that moment.
#if defined(__SANITIZE_THREAD__)
#define KT_UNDER_TSAN 1
#elif defined(__SANITIZE_ADDRESS__)
#define KT_UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KT_UNDER_TSAN 1
#elif __has_feature(address_sanitizer)
#define KT_UNDER_ASAN 1
#endif
#endif

namespace ktmoe::test {

using std::chrono::milliseconds;

// Sub-pools with these numbers of threads, all on the first node that this process may use.
inline WorkerPoolConfig subpools(const std::vector<int>& thread_counts) {
  const int node = Topology::read().node_cpus.begin()->first;
  return {static_cast<int>(thread_counts.size()), std::vector<int>(thread_counts.size(), node),
          thread_counts};
}

// False when `condition` did not come true in time: the test fails rather than hangs.
inline bool becomes_true(const std::function<bool()>& condition, milliseconds limit = milliseconds(10000)) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

// The message of what `action` throws as an `Exception`; otherwise a text that no test expects.
template <class Exception, class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Exception& error) {
    return error.what();
  } catch (...) {
    return "(an exception of another type)";
  }
  return "(no exception)";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Long enough for the threads of a pool or engine to end what they do and sleep.
inline void let_threads_fall_asleep() { std::this_thread::sleep_for(milliseconds(20)); }

// The processor time that all threads of the process use while this one sleeps.
inline double cpu_seconds_while_idle(milliseconds duration) {
  const auto cpu_seconds = [] {
    timespec now{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  };
  const double before = cpu_seconds();
  std::this_thread::sleep_for(duration);
  return cpu_seconds() - before;
}

// Runs `body` in a forked child. Returns what `body` returned (0 for success by convention), -1 if the child
// died or took too long.
inline int in_forked_child(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    int result = 99;
    try {
      result = body();
    } catch (...) {
    }
    _exit(result);
  }
  int status = 0;
  if (!becomes_true([&] { return waitpid(child, &status, WNOHANG) == child; })) {
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace ktmoe::test
