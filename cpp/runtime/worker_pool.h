// All workers of the engine, one InNumaPool per sub-pool: runs loops of independent tasks in parallel.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "runtime/fork_guard.h"
#include "runtime/in_numa_pool.h"
#include "runtime/job.h"
#include "runtime/scratch_pool.h"
#include "runtime/seating.h"
#include "runtime/task_trace.h"
#include "runtime/topology.h"
#include "runtime/worker_pool_config.h"

namespace ktmoe {

// The thread that calls run() works too, as worker 0 of sub-pool 0: a pool of n threads starts n - 1. It is
// not pinned; the CPU that would be its own is left free for it. Between jobs the other workers spin for a
// moment, then sleep: an idle pool uses no CPU.
class WorkerPool {
 public:
  explicit WorkerPool(WorkerPoolConfig config, const Topology& topology = Topology::read());
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int num_subpools() const { return config_.subpool_count; }
  int num_threads() const { return num_threads_; }
  int num_threads(int subpool) const { return config_.subpool_thread_count[subpool]; }
  int numa_node(int subpool) const { return config_.subpool_numa_map[subpool]; }
  const WorkerPoolConfig& config() const { return config_; }

  // Scratch that the calls of all layers on this pool share.
  ScratchPool& scratch() { return scratch_; }

  // The timeline that is being recorded, or null. Whoever runs tasks adds to it; it begins and ends by tasks
  // of the engine, between calls of layers.
  TaskTrace* trace() const { return trace_.get(); }
  void set_trace(std::shared_ptr<TaskTrace> trace) { trace_ = std::move(trace); }
  std::shared_ptr<TaskTrace> take_trace() { return std::exchange(trace_, nullptr); }

  // The CPUs left free for the caller of run().
  const std::vector<int>& caller_cpus() const { return caller_cpus_; }

  // Runs num_tasks[s] tasks in every sub-pool s, numbered from 0 in each, and returns when all have run. When
  // one throws, those not yet begun are skipped and the first exception is rethrown here; the pool stays
  // usable. Callers in several threads take turns. A task may call run(): that runs in the worker's own
  // thread.
  void run(std::span<const uint32_t> num_tasks, TaskFn fn);

  // The same for `num_tasks` tasks, numbered throughout and shared by the sub-pools as their threads are.
  void run(uint32_t num_tasks, TaskFn fn);

  // The same without waking anyone, for jobs so small that the calling thread is through with them sooner.
  void run_inline(std::span<const uint32_t> num_tasks, TaskFn fn);

  // True in a task of this pool.
  bool is_inside_task() const { return InsideTask::find(this) != nullptr; }

  // Ends the threads. run() still works afterwards, in the calling thread alone.
  void stop();

 private:
  Seating seat_workers(const std::vector<std::vector<CpuSet>>& cpus) const;
  void check_span(std::span<const uint32_t> num_tasks) const;
  uint32_t share_begin(uint32_t num_tasks, int subpool) const;
  void run_dealt(TaskFn fn, Job::Numbering numbering);
  void run_parallel(Job& job);
  bool is_drained() const;
  bool run_for_absent(Job& job);

  const WorkerPoolConfig config_;
  const int num_threads_;
  const ForkGuard fork_guard_;
  std::vector<int> caller_cpus_;
  ScratchPool scratch_;
  std::shared_ptr<TaskTrace> trace_;
  std::vector<std::unique_ptr<InNumaPool>> subpools_;
  std::vector<uint64_t> threads_before_;  // in the sub-pools before each; one entry more, for the end
  std::mutex mutex_;                      // locked by the caller of the current job
  Seating seating_;
  std::vector<uint32_t> first_task_;  // of the current job, see Job
};

}  // namespace ktmoe
