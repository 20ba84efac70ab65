// The lock for the Python classes of this package.
#include "runtime/call_lock.h"

#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings/tasks/gil.h"
#include "bindings/module.h"
#include "core/error.h"
#include "runtime/fork_guard.h"

namespace ktmoe::bindings {
namespace {

class PythonLock {
 public:
  PythonLock(std::string guards, bool of_engine) : guards_(std::move(guards)) {
    if (of_engine) fork_guard_.emplace();
  }

  // Between taking the lock and returning no signal is looked at, so an exception always means: not taken.
  void enter() {
    if (fork_guard_) fork_guard_->check();
    for (CallLock::Outcome outcome = lock_.try_take(); outcome != CallLock::Outcome::kTaken;) {
      if (outcome == CallLock::Outcome::kHeldByThisThread) throw_reentered();
      if (PyErr_CheckSignals() != 0) nb::raise_python_error();
      const GilRelease no_gil;
      outcome = lock_.take(std::chrono::steady_clock::now() + kSlice);
    }
  }
  void leave() { lock_.release(); }

 private:
  static constexpr std::chrono::milliseconds kSlice{50};  // after which Ctrl-C gets through

  [[noreturn]] void throw_reentered() const {
    throw_runtime(guards_,
                  ": got a call from within another one of the same thread, as a signal handler makes it, "
                  "expected it when that has returned");
  }

  const std::string guards_;
  std::optional<ForkGuard> fork_guard_;
  CallLock lock_;
};

}  // namespace

void bind_call_lock(nb::module_& m) {
  nb::class_<PythonLock>(m, "CallLock",
                         R"(A lock for `with` that never makes a thread wait for itself.

In a forked child it is free, even if it was locked in the parent; if it guards an object of an engine of the parent, using it is an error.

Parameters
----------
guards : str
    The guarded object, for messages.
of_engine : bool
    Whether the guarded object is unusable in a forked child.

Raises
------
RuntimeError
    By `with`: the thread has locked it already, as in a signal handler during a call; or, with `of_engine`, this is a fork of the process that created it.)")
      .def(nb::init<std::string, bool>(), nb::arg("guards"), nb::arg("of_engine") = false)
      .def("__enter__", &PythonLock::enter)
      .def(
          "__exit__", [](PythonLock& lock, nb::handle, nb::handle, nb::handle) { lock.leave(); },
          nb::arg("kind").none(), nb::arg("error").none(), nb::arg("trace").none());
}

}  // namespace ktmoe::bindings
