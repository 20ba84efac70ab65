// Objects of which a process has one, created anew in a forked child: the owner of a lock there may be a
// thread that does not exist, and the data of the object belong to the parent.
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
