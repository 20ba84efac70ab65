// The engine: a pool of workers, a queue of tasks, and the waiting for them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/fork_guard.h"
#include "runtime/futex.h"
#include "runtime/task_errors.h"
#include "runtime/task_queue.h"
#include "runtime/thread.h"
#include "runtime/ticket.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// Tasks run one after the other, in the order of their tickets, by the thread that has the consumer role. A
// background thread takes it when a submit() wakes it. But a thread that waits takes the role itself if it is
// free and runs the queue up to its own task: a synchronous call does not wait for another thread to start.
class CPUInfer {
 public:
  explicit CPUInfer(WorkerPoolConfig config);
  explicit CPUInfer(int num_threads);  // spread over the machine's nodes
  ~CPUInfer();                         // shuts down; finished tasks are destroyed here
  CPUInfer(const CPUInfer&) = delete;
  CPUInfer& operator=(const CPUInfer&) = delete;

  WorkerPool& pool() { return *pool_; }
  std::shared_ptr<WorkerPool> backend() const { return pool_; }

  // Queues a task. With wake = false no thread is woken: it runs when a thread waits for
  // it, or for a later task.
  Ticket submit(std::unique_ptr<Task> task, bool wake = true);

  // Waits until at most `allow_n_pending` of the tasks submitted up to now are unfinished. Rethrows the first
  // exception of those it waited for and discards the others; their tickets still report
  // them.
  void sync(uint64_t allow_n_pending = 0);

  // The same for the tasks up to a ticket and for about `timeout` at most: true when done, false when not.
  bool sync_for(uint64_t last_ticket, std::chrono::milliseconds timeout);

  // Waits like sync(), but keeps all exceptions for later calls.
  void finish(uint64_t allow_n_pending = 0);

  // Waits for one task, and so for all before it. Rethrows this task's exception only, on every
  // call. Throws std::invalid_argument for the ticket of another engine.
  void wait(const Ticket& ticket);

  // The same for a limited time: true when done, false when not. While this thread runs tasks itself it looks
  // at the clock between them, so it may take longer, and gets at least one done.
  bool wait_for(const Ticket& ticket, std::chrono::milliseconds timeout);

  uint64_t num_submitted() const { return queue_.num_pushed(); }
  uint64_t num_completed() const { return num_completed_.load(); }

  // Finished tasks, in order, for the caller to destroy. One load when there are none.
  std::vector<std::unique_ptr<Task>> take_finished();

  // Finishes the queued tasks and ends the threads. Afterwards submit() throws. May be repeated.
  void shutdown();

 private:
  static constexpr uint64_t kNobody = std::numeric_limits<uint64_t>::max();

  void check_ticket(const Ticket& ticket) const;
  void rethrow(const Ticket& ticket);
  void check_not_inside_task() const;
  bool run_until(uint64_t ticket, const Deadline& deadline);
  bool consume_until(const std::atomic<uint64_t>& ticket, const Deadline& deadline);
  void execute(std::unique_ptr<Task> task);
  void release_role();
  bool await_progress(uint64_t ticket, const Deadline& deadline);
  void wake_waiters();
  void ring_background();
  void background_main();

  const ForkGuard fork_guard_;
  const uint64_t number_;  // among all engines of the process
  const std::shared_ptr<WorkerPool> pool_;
  TaskQueue queue_;
  TaskStack finished_;
  TaskErrors errors_;
  std::atomic<uint64_t> num_completed_{0};  // which is the ticket of the last task that finished

  std::atomic<uint64_t> lowest_awaited_{kNobody};  // ticket for which a thread sleeps, on progress_
  Futex progress_;

  std::atomic<uint64_t> background_until_{0};  // ticket up to which the background thread shall run the queue
  Futex bell_;                                 // on which it sleeps
  std::atomic<bool> stopping_{false};
  std::mutex shutdown_mutex_;
  std::unique_ptr<Thread> background_;  // null after shutdown
};

}  // namespace ktmoe
