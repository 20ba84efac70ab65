// Letting go of the GIL during a wait, and taking it back unless the interpreter has ended meanwhile.
#pragma once

#include <nanobind/nanobind.h>

namespace ktmoe::bindings {

// Called once, when the module is loaded.
void init_gil();

// A daemon thread may still be in a wait when the interpreter ends. To ask for the GIL then would end the
// thread by unwinding its stack, which C++ frames that must not throw turn into the end of the process. Such
// a thread sleeps instead, until the process is gone.
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
