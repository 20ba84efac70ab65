// How the engine's threads are started.
#include "runtime/thread.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace ktmoe {
namespace {

// While it lives, new threads inherit a mask that leaves the process's signals (Ctrl-C among them) to the
// threads of the application. Faults stay deliverable: blocked, they would kill the process without a trace.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS})
      sigdelset(&blocked, fault);
    pthread_sigmask(SIG_BLOCK, &blocked, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

Thread::Thread(const std::string& name, const std::vector<int>& cpus, std::function<void()> body) {
  const SignalsBlocked blocked;
  try {
    thread_ = std::thread(std::move(body));
  } catch (const std::system_error& error) {
    throw_runtime("could not start thread '", name, "': ", error.what());
  }
  pthread_setname_np(thread_.native_handle(), name.c_str());
  pin(cpus);
}

bool Thread::pin(const std::vector<int>& cpus) {
  if (cpus.empty()) return false;
  const int num_cpus = *std::max_element(cpus.begin(), cpus.end()) + 1;
  cpu_set_t* set = CPU_ALLOC(num_cpus);
  if (set == nullptr) return false;
  const size_t bytes = CPU_ALLOC_SIZE(num_cpus);
  CPU_ZERO_S(bytes, set);
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, set);
  const bool done = pthread_setaffinity_np(thread_.native_handle(), bytes, set) == 0;
  CPU_FREE(set);
  return done;
}

void Thread::abandon() {
  // Neither join nor detach may be called on it, and the destructor of a joinable std::thread terminates: the
  // handle is leaked on purpose.
  new std::thread(std::move(thread_));
}

}  // namespace ktmoe
