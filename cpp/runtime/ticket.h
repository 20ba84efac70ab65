// What a submitted task leaves behind: its place in the queue, and its exception if it throws.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <utility>

namespace ktmoe {

class CPUInfer;

// Written by the thread that runs the task, before the engine counts the task as completed; read after that.
struct TaskOutcome {
  uint64_t engine = 0;  // a number of the engine that no other has had
  std::exception_ptr error;
};

// A submitted task, to wait for. The exception of a failed task lives as long as a ticket of
// it, so a failure cannot be mistaken for success, even if the engine has reported it to another caller.
class Ticket {
 public:
  Ticket() = default;
  Ticket(uint64_t number, std::shared_ptr<const TaskOutcome> outcome)
      : number_(number), outcome_(std::move(outcome)) {}

  uint64_t number() const { return number_; }  // 1, 2, 3 ... in the order of execution

 private:
  friend class CPUInfer;
  uint64_t number_ = 0;
  std::shared_ptr<const TaskOutcome> outcome_;
};

}  // namespace ktmoe
