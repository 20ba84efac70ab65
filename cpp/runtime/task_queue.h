// The tasks submitted to an engine: any thread adds them, without a lock; one at a time runs them, in order.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "runtime/ticket.h"

namespace ktmoe {

// A unit of work and its data. The thread with the consumer role runs it, but only the thread that takes it
// back when finished destroys it: releasing its data may need a lock.
class Task {
 public:
  Task() = default;
  virtual ~Task() = default;
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

  virtual void run() = 0;

  // Whether its data can be released without a lock: then it is destroyed as soon as it has run.
  virtual bool ends_anywhere() const { return false; }

  void set_outcome(std::shared_ptr<TaskOutcome> outcome) { outcome_ = std::move(outcome); }
  const std::shared_ptr<TaskOutcome>& outcome() const { return outcome_; }

 private:
  friend class TaskList;
  friend class TaskStack;
  friend class TaskQueue;
  Task* next_ = nullptr;  // in the one list that the task is in
  uint64_t ticket_ = 0;
  std::shared_ptr<TaskOutcome> outcome_;  // shared with the owners of the ticket
};

// A list of tasks that belongs to one thread, linked through the tasks themselves.
class TaskList {
 public:
  TaskList() = default;
  explicit TaskList(Task* first) : first_(first) {}
  TaskList(TaskList&& other) noexcept : first_(other.leak()) {}
  TaskList& operator=(TaskList&&) = delete;
  ~TaskList();

  const Task* front() const { return first_; }
  size_t size() const;
  std::unique_ptr<Task> pop_front();
  void insert_by_ticket(std::unique_ptr<Task> task);  // the list is, and stays, ascending

  // Gives up the ownership of all tasks.
  Task* leak() { return std::exchange(first_, nullptr); }

 private:
  Task* first_ = nullptr;
};

// Tasks that many threads put down and one picks up, all at once. Nobody looks into a task that another
// thread might have taken away, so a reused address does no harm.
class TaskStack {
 public:
  TaskStack() = default;
  ~TaskStack() { take_all(); }
  TaskStack(const TaskStack&) = delete;
  TaskStack& operator=(const TaskStack&) = delete;

  void push(std::unique_ptr<Task> task);
  TaskList take_all();  // the last one first; one load when there are none

 private:
  std::atomic<Task*> top_{nullptr};
};

// A producer draws a ticket, then puts its task on a stack; the consumer takes the whole stack and sorts it
// by ticket. (A linked queue would be in order by itself, but could not tell a producer its place in it.)
class TaskQueue {
 public:
  // Returns the task's ticket: 1, 2, 3 ... in the order of execution. After close() it throws runtime_error.
  uint64_t push(std::unique_ptr<Task> task);

  // Refuses tasks from now on. Returns the last ticket.
  uint64_t close();

  uint64_t num_pushed() const { return tickets_.load() & ~kClosed; }

  // The consumer role: at most one thread has it.
  bool try_acquire_role() { return !role_taken_.exchange(true); }
  void release_role() { role_taken_.store(false); }
  bool is_role_free() const { return !role_taken_.load(); }

  // For the thread that has the role: the next task, or null. Null may also mean that a producer is just
  // between its ticket and the stack; then the task appears in a moment.
  std::unique_ptr<Task> pop();

  // In a forked child, where a consumer may have been lost in the middle of pop(): leaks the queued tasks.
  void abandon();

 private:
  static constexpr uint64_t kClosed = uint64_t{1} << 63;

  std::atomic<uint64_t> tickets_{0};  // the last one drawn; close() adds kClosed
  TaskStack inbox_;
  std::atomic<bool> role_taken_{false};
  TaskList ready_;            // sorted; belongs to the role
  uint64_t next_ticket_ = 1;  // to be popped; belongs to the role
};

}  // namespace ktmoe
