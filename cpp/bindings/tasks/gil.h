// Letting go of the GIL during a wait, and taking it back unless the interpreter has ended meanwhile.
#pragma once

#include <nanobind/nanobind.h>

namespace ktmoe::bindings {

// Called once, when the module is loaded.
void init_gil();

// A daemon thread may still be waiting when the interpreter ends. Acquiring the GIL then would unwind its
// stack, which terminates the process in noexcept frames. Such a thread sleeps instead, until the process
// ends.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease();
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace ktmoe::bindings
