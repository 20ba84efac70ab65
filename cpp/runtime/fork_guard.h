// Knows whether the process has been forked since the guard was made: threads do not survive a fork.
#pragma once

#include <cstdint>

namespace ktmoe {

// Forks between the process that loaded the library and this one.
uint32_t num_forks();

class ForkGuard {
 public:
  ForkGuard();

  // True in a child that inherited this guard's owner without its threads.
  bool in_child() const;

  // Throws in such a child, with what to do about it.
  void check() const {
    if (in_child()) throw_in_child();
  }

 private:
  [[noreturn]] static void throw_in_child();

  uint32_t generation_;
};

}  // namespace ktmoe
