// The life of a worker thread, and the moves of the caller in the protocol that in_numa_pool.h describes.
#include "runtime/in_numa_pool.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace ktmoe {
namespace {

// A wake-up costs the waker 1 to 2 us. The caller wakes a few, each of those wakes a few more, so that the
// caller gets to its own tasks and the last of n sleepers is up after log(n) steps rather than n.
constexpr int kWakesAtOnce = 3;

bool is_open(uint32_t epoch) { return epoch % 2 == 1; }

}  // namespace

InNumaPool::InNumaPool(Crew crew) : crew_(std::move(crew)), shares_(new WorkerShare[crew_.cpus.size()]) {
  neighbors_ = {this};
  try {
    for (int position = crew_.caller_is_first ? 1 : 0; position < num_workers(); ++position) {
      threads_.emplace_back(str_cat("ktmoe-", crew_.first_worker + position), crew_.cpus[position],
                            [this, position] { worker_main(position); });
    }
  } catch (...) {
    stop();
    throw;
  }
}

InNumaPool::~InNumaPool() { stop(); }

Thread* InNumaPool::thread(int position) {
  if (crew_.caller_is_first) --position;
  return position < 0 || threads_.empty() ? nullptr : &threads_[position];
}

void InNumaPool::stop() {
  stopping_.store(true);
  epoch_.bump(2);
  epoch_.wake_all();
  for (Thread& thread : threads_) thread.join();
  threads_.clear();
}

void InNumaPool::abandon() {
  for (Thread& thread : threads_) thread.abandon();
  threads_.clear();
}

// ---- the caller ----

void InNumaPool::deal(Job& job, uint32_t begin, uint32_t end) {
  job_ = &job;
  num_dealt_ = end - begin;
  const uint64_t num_shares = crew_.cpus.size();
  const auto boundary = [=, this](uint64_t share) {
    return begin + static_cast<uint32_t>(num_dealt_ * share / num_shares);
  };
  for (uint64_t i = 0; i < num_shares; ++i) shares_[i].range.reset(boundary(i), boundary(i + 1));
}

void InNumaPool::open() {
  uint64_t wanted = 0;
  for (const InNumaPool* pool : neighbors_) wanted += pool->num_dealt_;
  if (crew_.caller_is_first && wanted > 0) --wanted;  // one is the caller's
  wanted_.store(static_cast<int>(std::min(wanted, crew_.cpus.size())), std::memory_order_relaxed);
  epoch_.bump();
  wake_some();
}

bool InNumaPool::run_for_absent(Job& job, const Worker& helper) {
  for (int i = 0; i < num_workers(); ++i) {
    uint32_t task = 0;
    if (shares_[i].inside.load() || !shares_[i].range.pop_front(task)) continue;
    job.run(helper, task);
    return true;
  }
  return false;
}

bool InNumaPool::is_drained() const {
  return std::all_of(&shares_[0], &shares_[0] + num_workers(),
                     [](const WorkerShare& share) { return share.range.size() == 0; });
}

void InNumaPool::close() { epoch_.bump(); }

void InNumaPool::wait_until_left(Backoff& backoff) const {
  for (int i = 0; i < num_workers(); ++i) {
    while (shares_[i].inside.load()) backoff.wait();
  }
}

// ---- the workers ----

void InNumaPool::worker_main(int position) {
  const InsideTask inside(crew_.pool, worker(position));
  WorkerShare& share = shares_[position];
  uint32_t seen = 0;
  while (true) {
    const bool has_slept = wait_for_epoch_after(seen);
    seen = epoch_.load();
    if (stopping_.load()) return;  // looked at after the epoch: who has seen that of the end sees this too
    if (!is_open(seen)) continue;
    share.inside.exchange(true);  // no store, see in_numa_pool.h
    if (epoch_.load() == seen) {
      if (has_slept) wake_some();
      work(*job_, position);
    }
    share.inside.store(false, std::memory_order_release);
  }
}

// True when it had to sleep.
bool InNumaPool::wait_for_epoch_after(uint32_t seen) {
  const auto is_over = [this, seen] { return epoch_.load() != seen; };
  if (spin_until(is_over, crew_.spin_between_jobs)) return false;
  while (!is_over()) epoch_.sleep_while(seen);
  return true;
}

void InNumaPool::wake_some() {
  if (!epoch_.has_sleepers()) return;
  int wanted = wanted_.load(std::memory_order_relaxed);
  int num = 0;
  do {
    num = std::min(wanted, kWakesAtOnce);
    if (num <= 0) return;
  } while (!wanted_.compare_exchange_weak(wanted, wanted - num, std::memory_order_relaxed));
  epoch_.wake(num);
}

void InNumaPool::work(Job& job, int position) {
  const Worker me = worker(position);
  TaskRange& range = shares_[position].range;
  uint32_t task = 0;
  while (!job.failed()) {
    if (range.pop_front(task)) {
      job.run(me, task);
    } else if (!steal_into(position)) {
      return;
    }
  }
}

bool InNumaPool::steal_into(int position) {
  for (InNumaPool* victim : neighbors_) {
    while (WorkerShare* share = victim->largest(position)) {
      if (share->range.move_back_half_to(shares_[position].range)) return true;
    }
  }
  return false;
}

// The share with the most tasks, null when none has any. Among equals the first from `start` on, so that
// thieves who look at the same moment go to different victims.
InNumaPool::WorkerShare* InNumaPool::largest(int start) {
  WorkerShare* best = nullptr;
  uint32_t best_size = 0;
  for (int i = 0; i < num_workers(); ++i) {
    WorkerShare& share = shares_[(start + i) % num_workers()];
    const uint32_t size = share.range.size();
    if (size <= best_size) continue;
    best = &share;
    best_size = size;
  }
  return best;
}

}  // namespace ktmoe
