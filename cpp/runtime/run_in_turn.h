// Tasks that follow each other: each one is submitted when the one before is done.
#pragma once

#include <cstddef>
#include <memory>

#include "core/function_ref.h"
#include "runtime/cpuinfer.h"

namespace ktmoe {

// Submits task after task and lets `wait` wait for each. An exception of `wait`, the task's own or another
// that ends the wait, leaves the tasks behind it unsubmitted. In between, tasks of other threads get their
// turn.
inline void run_in_turn(CPUInfer& engine, size_t num_tasks, FunctionRef<std::unique_ptr<Task>(size_t)> make,
                        FunctionRef<void(const Ticket&)> wait) {
  for (size_t i = 0; i < num_tasks; ++i) wait(engine.submit(make(i), /*wake=*/false));
}

}  // namespace ktmoe
