#include "bindings/tasks/gil.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace ktmoe::bindings {
namespace {

namespace nb = nanobind;

std::atomic<bool> interpreter_ends{false};
std::atomic<std::thread::id> ending_thread;

// Threads that already wait for the GIL get it in this pause, and will not wait again.
void at_exit() {
  ending_thread.store(std::this_thread::get_id());
  interpreter_ends.store(true);
  const GilRelease release;
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

void init_gil() { nb::module_::import_("atexit").attr("register")(nb::cpp_function(&at_exit)); }

GilRelease::~GilRelease() {
  if (interpreter_ends.load() && ending_thread.load() != std::this_thread::get_id()) {
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
  }
  PyEval_RestoreThread(state_);
}

}  // namespace ktmoe::bindings
