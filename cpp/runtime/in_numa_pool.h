// The workers of one sub-pool: threads pinned to CPUs of one NUMA node, which share work by stealing.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "runtime/futex.h"
#include "runtime/job.h"
#include "runtime/pause.h"
#include "runtime/task_range.h"
#include "runtime/thread.h"

namespace ktmoe {

// How a job runs, and why it never waits for a thread that has not come:
//
// The thread that calls WorkerPool::run (the caller) deals every worker a range of tasks, then opens the job
// by making epoch_ odd. Workers that see this enter; each runs its own range, then steals. Ranges of workers
// that are still asleep are stolen like any other. When the caller sees that nothing is left to take it
// closes the job by making epoch_ even and waits for the workers that are inside. Entering and closing cross
// safely: a worker first says that it is inside, then looks whether the job is still open; the caller first
// closes, then looks who is inside; with sequential consistency at least one of the two sees the other. Both
// exchange or add rather than store: qemu-user lets a load overtake an earlier store, whatever their order. A
// worker that arrives too late leaves without having touched anything. A worker leaves only when its own
// range is empty, so when all have left, all tasks have run. No counter on the way is written by all workers.
class InNumaPool {
 public:
  struct Crew {
    const void* pool = nullptr;  // the identity under which tasks are known to be inside (InsideTask)
    int subpool = 0;
    int first_worker = 0;                // index of its first worker in the whole pool
    std::vector<std::vector<int>> cpus;  // for each worker, where it may run
    bool caller_is_first = false;        // the first worker is the caller: no thread is made for it
    std::chrono::nanoseconds spin_between_jobs{0};
  };

  explicit InNumaPool(Crew crew);
  ~InNumaPool();
  InNumaPool(const InNumaPool&) = delete;
  InNumaPool& operator=(const InNumaPool&) = delete;

  // The sub-pools on the same node, this one first: its workers steal from them in this order.
  void set_neighbors(std::vector<InNumaPool*> neighbors) { neighbors_ = std::move(neighbors); }

  // The thread of a worker; null for the caller, who has none of the pool's.
  Thread* thread(int position);

  int num_workers() const { return static_cast<int>(crew_.cpus.size()); }

  // All that follows is for one thread at a time: the caller of the current job.

  // Deals tasks [begin, end) to the workers. Every sub-pool's share is dealt before any job is opened.
  void deal(Job& job, uint32_t begin, uint32_t end);

  // Lets the workers in, and wakes as many sleepers as there are tasks for on this node.
  void open();

  // Works on the job as the first worker until there is nothing to take on this node.
  void work_as_first(Job& job) { work(job, 0); }

  // Runs one task out of the range of a worker that has not come; false when there is none.
  bool run_for_absent(Job& job, const Worker& helper);

  bool is_drained() const;  // all ranges are empty; tasks may still be running
  void close();
  void wait_until_left(Backoff& backoff) const;

  // Ends the threads. Jobs still run afterwards, on the caller alone.
  void stop();

  // In a forked child, instead of stop().
  void abandon();

 private:
  // Two cache lines, since the hardware prefetcher fetches lines in pairs.
  struct alignas(128) WorkerShare {
    TaskRange range;
    std::atomic<bool> inside{false};
  };

  Worker worker(int position) const { return {crew_.first_worker + position, crew_.subpool}; }
  void worker_main(int position);
  bool wait_for_epoch_after(uint32_t seen);
  void work(Job& job, int position);
  bool steal_into(int position);
  WorkerShare* largest(int start);
  void wake_some();

  Crew crew_;
  std::unique_ptr<WorkerShare[]> shares_;
  std::vector<InNumaPool*> neighbors_;
  Job* job_ = nullptr;      // valid while epoch_ is odd
  uint64_t num_dealt_ = 0;  // tasks of that job
  std::vector<Thread> threads_;
  std::atomic<bool> stopping_{false};
  alignas(128) Futex epoch_;                 // odd while a job is open; spun on and slept on
  alignas(128) std::atomic<int> wanted_{0};  // sleepers that the job still has tasks for
};

}  // namespace ktmoe
