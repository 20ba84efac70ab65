// Objects that a process has one of, anew in a forked child: a lock there may be held by a thread that does
// not exist, and what the object refers to belongs to the parent.
#pragma once

#include <atomic>

#include "runtime/fork_guard.h"

namespace ktmoe {

// The one object of a class T. It is never destroyed, since threads of other libraries may use it until the
// process is gone; that of a parent process is left alone.
template <class T>
T& of_this_process() {
  struct Entry {
    ForkGuard guard;
    T object;
  };
  static std::atomic<Entry*> newest{new Entry};
  Entry* entry = newest.load();
  while (entry->guard.in_child()) {
    Entry* const fresh = new Entry;
    if (newest.compare_exchange_strong(entry, fresh)) return fresh->object;
    delete fresh;
  }
  return entry->object;
}

}  // namespace ktmoe
