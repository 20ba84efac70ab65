// A fork handler counts the generations, so that asking costs one load where getpid() costs a system call.
#include "runtime/fork_guard.h"

#include <pthread.h>

#include <atomic>
#include <new>

#include "core/error.h"

namespace ktmoe {
namespace {

std::atomic<uint32_t> forks{0};

void register_fork_handler() {
  static const int result =
      pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  if (result != 0) throw std::bad_alloc();
}

}  // namespace

uint32_t num_forks() {
  register_fork_handler();
  return forks.load(std::memory_order_relaxed);
}

ForkGuard::ForkGuard() : generation_(num_forks()) {}

bool ForkGuard::in_child() const { return forks.load(std::memory_order_relaxed) != generation_; }

void ForkGuard::throw_in_child() {
  throw_runtime(
      "this engine was created before the process was forked, and its threads do not exist in the forked "
      "child: create the engine after the fork, use the 'spawn' start method, or call "
      "KTMoEWrapper.reset_engine() in the child");
}

}  // namespace ktmoe
