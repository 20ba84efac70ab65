// The caller's side of a job over all sub-pools.
#include "runtime/worker_pool.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "core/error.h"

namespace ktmoe {
namespace {

// A layer call is a few jobs with microseconds between them, and waking a sleeper takes 5 to 50 us. Spinning
// for about as long as a wake-up takes costs at most twice the optimum.
constexpr std::chrono::microseconds kSpinBetweenJobs{50};

WorkerPoolConfig validated(WorkerPoolConfig config, const Topology& topology) {
  config.validate(topology);
  return config;
}

}  // namespace

WorkerPool::WorkerPool(WorkerPoolConfig config, const Topology& topology)
    : config_(validated(std::move(config), topology)),
      num_threads_(config_.num_threads()),
      threads_before_{0},
      first_task_(config_.subpool_count + 1, 0) {
  const std::vector<std::vector<CpuSet>> cpus = config_.assign_cpus(topology);
  const bool is_crowded = config_.is_crowded(topology);
  caller_cpus_ = cpus.front().front();
  for (int s = 0; s < num_subpools(); ++s) {
    InNumaPool::Crew crew;
    crew.pool = this;
    crew.subpool = s;
    crew.first_worker = static_cast<int>(threads_before_.back());
    crew.cpus = cpus[s];
    crew.caller_is_first = s == 0;
    // A spinning worker that shares its CPU would keep another from working.
    if (!is_crowded) crew.spin_between_jobs = kSpinBetweenJobs;
    threads_before_.push_back(threads_before_.back() + crew.cpus.size());
    subpools_.push_back(std::make_unique<InNumaPool>(std::move(crew)));
  }
  for (int s = 0; s < num_subpools(); ++s) {
    std::vector<InNumaPool*> neighbors{subpools_[s].get()};
    for (int other = 0; other < num_subpools(); ++other) {
      if (other != s && numa_node(other) == numa_node(s)) neighbors.push_back(subpools_[other].get());
    }
    subpools_[s]->set_neighbors(std::move(neighbors));
  }
  if (!is_crowded) seating_ = seat_workers(cpus);
}

// There are seats to keep when every worker has a CPU of its own, the caller included.
Seating WorkerPool::seat_workers(const std::vector<std::vector<CpuSet>>& cpus) const {
  std::vector<Thread*> worker_on_cpu;
  for (int s = 0; s < num_subpools(); ++s) {
    for (int i = 0; i < num_threads(s); ++i) {
      if (cpus[s][i].size() > 1) return {};
      const int cpu = cpus[s][i].front();
      if (cpu >= static_cast<int>(worker_on_cpu.size())) worker_on_cpu.resize(cpu + 1);
      worker_on_cpu[cpu] = subpools_[s]->thread(i);
    }
  }
  return {caller_cpus_.front(), std::move(worker_on_cpu)};
}

WorkerPool::~WorkerPool() {
  if (!fork_guard_.in_child()) return;
  for (auto& subpool : subpools_) subpool->abandon();
}

void WorkerPool::stop() {
  fork_guard_.check();
  const std::lock_guard lock(mutex_);
  seating_ = {};  // refers to the threads
  for (auto& subpool : subpools_) subpool->stop();
}

void WorkerPool::run(std::span<const uint32_t> num_tasks, TaskFn fn) {
  fork_guard_.check();
  check_span(num_tasks);
  if (is_inside_task()) return run_inline(num_tasks, fn);
  const std::lock_guard lock(mutex_);
  for (size_t s = 0; s < num_tasks.size(); ++s) first_task_[s + 1] = first_task_[s] + num_tasks[s];
  run_dealt(fn, Job::Numbering::kPerSubpool);
}

void WorkerPool::run(uint32_t num_tasks, TaskFn fn) {
  fork_guard_.check();
  if (const Worker* me = InsideTask::find(this)) {
    for (int s = 0; s < num_subpools(); ++s) {
      const uint32_t end = share_begin(num_tasks, s + 1);
      for (uint32_t task = share_begin(num_tasks, s); task < end; ++task) fn(*me, s, task);
    }
    return;
  }
  const std::lock_guard lock(mutex_);
  for (int s = 0; s <= num_subpools(); ++s) first_task_[s] = share_begin(num_tasks, s);
  run_dealt(fn, Job::Numbering::kThroughout);
}

void WorkerPool::run_inline(std::span<const uint32_t> num_tasks, TaskFn fn) {
  fork_guard_.check();
  check_span(num_tasks);
  const Worker* inside = InsideTask::find(this);
  // Nobody else may be worker 0 meanwhile.
  const auto lock = inside == nullptr ? std::unique_lock(mutex_) : std::unique_lock<std::mutex>();
  const Worker me = inside == nullptr ? Worker{} : *inside;
  const InsideTask scope(this, me);
  for (size_t s = 0; s < num_tasks.size(); ++s) {
    for (uint32_t task = 0; task < num_tasks[s]; ++task) fn(me, static_cast<int>(s), task);
  }
}

void WorkerPool::check_span(std::span<const uint32_t> num_tasks) const {
  if (num_tasks.size() != subpools_.size()) {
    throw_invalid("num_tasks: got ", num_tasks.size(), " entries, expected one for each of the ",
                  subpools_.size(), " sub-pools");
  }
  uint64_t total = 0;
  for (const uint32_t num : num_tasks) total += num;
  constexpr uint32_t kMaxTasks = std::numeric_limits<uint32_t>::max();
  if (total > kMaxTasks) throw_invalid("num_tasks: got ", total, " in all, expected at most ", kMaxTasks);
}

// The first of `num_tasks` tasks that belongs to `subpool`.
uint32_t WorkerPool::share_begin(uint32_t num_tasks, int subpool) const {
  return static_cast<uint32_t>(num_tasks * threads_before_[subpool] / threads_before_.back());
}

void WorkerPool::run_dealt(TaskFn fn, Job::Numbering numbering) {
  if (first_task_.back() == 0) return;
  Job job(fn, first_task_, numbering);
  run_parallel(job);
  job.rethrow_if_failed();
}

void WorkerPool::run_parallel(Job& job) {
  const InsideTask inside(this, Worker{});
  seating_.make_way_for_this_thread();
  for (size_t s = 0; s < subpools_.size(); ++s) subpools_[s]->deal(job, first_task_[s], first_task_[s + 1]);
  for (auto& subpool : subpools_) subpool->open();

  Backoff backoff;
  subpools_.front()->work_as_first(job);
  while (!job.failed() && !is_drained()) {
    // The remaining tasks are on other nodes, or were being stolen when the caller looked.
    if (!run_for_absent(job)) backoff.wait();
    subpools_.front()->work_as_first(job);
  }
  for (auto& subpool : subpools_) subpool->close();
  for (auto& subpool : subpools_) subpool->wait_until_left(backoff);
}

bool WorkerPool::is_drained() const {
  return std::all_of(subpools_.begin(), subpools_.end(),
                     [](const auto& subpool) { return subpool->is_drained(); });
}

bool WorkerPool::run_for_absent(Job& job) {
  return std::any_of(subpools_.begin(), subpools_.end(),
                     [&job](const auto& subpool) { return subpool->run_for_absent(job, Worker{}); });
}

}  // namespace ktmoe
