// Tells a thread whether, and as which worker, it is running a task of a given pool or engine.
#pragma once

namespace ktmoe {

struct Worker {
  int index = 0;    // 0 .. num_threads-1 over the whole pool; no two threads in a job have the same
  int subpool = 0;  // to which the worker belongs
};

// While it lives, the calling thread runs tasks of `owner` as `worker`. They nest: a task may use another
// engine.
class InsideTask {
 public:
  explicit InsideTask(const void* owner, const Worker& worker = {})
      : owner_(owner), worker_(worker), outer_(innermost_) {
    innermost_ = this;
  }
  ~InsideTask() { innermost_ = outer_; }
  InsideTask(const InsideTask&) = delete;
  InsideTask& operator=(const InsideTask&) = delete;

  // Null when the calling thread runs no task of `owner`.
  static const Worker* find(const void* owner) {
    const InsideTask* scope = innermost_;
    while (scope != nullptr && scope->owner_ != owner) scope = scope->outer_;
    return scope == nullptr ? nullptr : &scope->worker_;
  }

 private:
  static inline thread_local const InsideTask* innermost_ = nullptr;

  const void* owner_;
  Worker worker_;
  const InsideTask* outer_;
};

}  // namespace ktmoe
