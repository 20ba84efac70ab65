// A thread of the engine: named, pinned, deaf to signals, and possible to abandon in a forked child.
#pragma once

#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace ktmoe {

class Thread {
 public:
  // Runs `body` on a new thread pinned to `cpus`. Throws runtime_error when there is no thread to be had;
  // CPUs that cannot be used are no error, since where a thread runs is a matter of speed alone.
  Thread(const std::string& name, const std::vector<int>& cpus, std::function<void()> body);
  Thread(Thread&&) = default;
  Thread& operator=(Thread&&) = default;

  // From now on the thread may use these CPUs only. False, and all as before, when the kernel refuses.
  bool pin(const std::vector<int>& cpus);

  void join() { thread_.join(); }

  // Forgets the thread instead of joining it: in a forked child it does not exist.
  void abandon();

 private:
  std::thread thread_;
};

}  // namespace ktmoe
