// Who runs the queue, and how those wait who do not.
#include "runtime/cpuinfer.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "runtime/pause.h"

namespace ktmoe {
namespace {

// A waiter that another thread serves takes a CPU from the workers while it spins, so it does that for less
// time than they do: long enough for the end of a task, not for a whole one.
constexpr std::chrono::microseconds kWaiterSpin{20};

void raise_to(std::atomic<uint64_t>& value, uint64_t at_least) {
  uint64_t now = value.load();
  while (now < at_least && !value.compare_exchange_weak(now, at_least)) {
  }
}

void lower_to(std::atomic<uint64_t>& value, uint64_t at_most) {
  uint64_t now = value.load();
  while (now > at_most && !value.compare_exchange_weak(now, at_most)) {
  }
}

uint64_t next_number() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

// Beyond a year it is for ever, which also keeps the clock from overflowing.
Deadline deadline_in(std::chrono::milliseconds timeout) {
  if (timeout > std::chrono::hours(24 * 365)) return {};
  return std::chrono::steady_clock::now() + timeout;
}

bool has_passed(const Deadline& deadline) {
  return deadline && std::chrono::steady_clock::now() >= *deadline;
}

}  // namespace

CPUInfer::CPUInfer(WorkerPoolConfig config)
    : number_(next_number()), pool_(std::make_shared<WorkerPool>(std::move(config))) {
  background_ = std::make_unique<Thread>("ktmoe-queue", pool_->caller_cpus(), [this] { background_main(); });
}

CPUInfer::CPUInfer(int num_threads)
    : CPUInfer(WorkerPoolConfig::with_threads(num_threads, Topology::read())) {}

CPUInfer::~CPUInfer() {
  if (fork_guard_.in_child()) {
    queue_.abandon();
    if (background_) background_->abandon();
  } else {
    shutdown();
  }
}

Ticket CPUInfer::submit(std::unique_ptr<Task> task, bool wake) {
  fork_guard_.check();
  if (!task) throw_invalid("task: got null, expected a task");
  const auto outcome = std::make_shared<TaskOutcome>();
  outcome->engine = number_;
  task->set_outcome(outcome);
  const Ticket ticket(queue_.push(std::move(task)), outcome);
  if (wake) {
    raise_to(background_until_, ticket.number());
    // Whoever has the role looks at background_until_ when letting go of it.
    if (queue_.is_role_free()) ring_background();
  }
  return ticket;
}

void CPUInfer::sync(uint64_t allow_n_pending) {
  fork_guard_.check();
  const uint64_t submitted = num_submitted();
  const uint64_t last = submitted - std::min(submitted, allow_n_pending);
  run_until(last, {});
  if (const std::exception_ptr error = errors_.take_first_through(last)) std::rethrow_exception(error);
}

bool CPUInfer::sync_for(uint64_t last_ticket, std::chrono::milliseconds timeout) {
  fork_guard_.check();
  const uint64_t last = std::min(last_ticket, num_submitted());
  if (!run_until(last, deadline_in(timeout))) return false;
  if (const std::exception_ptr error = errors_.take_first_through(last)) std::rethrow_exception(error);
  return true;
}

void CPUInfer::finish(uint64_t allow_n_pending) {
  fork_guard_.check();
  const uint64_t submitted = num_submitted();
  run_until(submitted - std::min(submitted, allow_n_pending), {});
}

void CPUInfer::wait(const Ticket& ticket) {
  fork_guard_.check();
  check_ticket(ticket);
  run_until(ticket.number(), {});
  rethrow(ticket);
}

bool CPUInfer::wait_for(const Ticket& ticket, std::chrono::milliseconds timeout) {
  fork_guard_.check();
  check_ticket(ticket);
  if (!run_until(ticket.number(), deadline_in(timeout))) return false;
  rethrow(ticket);
  return true;
}

void CPUInfer::check_ticket(const Ticket& ticket) const {
  if (ticket.outcome_ == nullptr || ticket.outcome_->engine != number_)
    throw_invalid("ticket: got one of another engine, expected one that submit() of this engine returned");
}

void CPUInfer::rethrow(const Ticket& ticket) {
  if (ticket.outcome_->error == nullptr) return;
  errors_.forget(ticket.number());
  std::rethrow_exception(ticket.outcome_->error);
}

void CPUInfer::check_not_inside_task() const {
  if (InsideTask::find(this) == nullptr && !pool_->is_inside_task()) return;
  throw_runtime("a task cannot wait for another task of its own engine, nor shut the engine down");
}

std::vector<std::unique_ptr<Task>> CPUInfer::take_finished() {
  TaskList list = finished_.take_all();
  std::vector<std::unique_ptr<Task>> tasks(list.size());
  std::generate(tasks.rbegin(), tasks.rend(), [&list] { return list.pop_front(); });
  return tasks;
}

void CPUInfer::shutdown() {
  fork_guard_.check();
  check_not_inside_task();
  const std::lock_guard lock(shutdown_mutex_);
  if (!background_) return;
  run_until(queue_.close(), {});
  stopping_.store(true);
  ring_background();
  background_->join();
  background_.reset();
  pool_->stop();
}

// Returns when all tasks up to `ticket` have run, or false when the deadline comes first.
bool CPUInfer::run_until(uint64_t ticket, const Deadline& deadline) {
  const std::atomic<uint64_t> until{ticket};
  while (num_completed() < ticket) {
    check_not_inside_task();
    if (queue_.try_acquire_role()) {
      const bool done = consume_until(until, deadline);
      release_role();
      if (!done) return false;
    } else if (!await_progress(ticket, deadline)) {
      return false;
    }
  }
  return true;
}

// ---- with the consumer role ----

// The bound may rise meanwhile. The deadline is looked at between tasks.
bool CPUInfer::consume_until(const std::atomic<uint64_t>& ticket, const Deadline& deadline) {
  Backoff backoff;
  while (num_completed() < ticket.load()) {
    if (std::unique_ptr<Task> task = queue_.pop()) {
      execute(std::move(task));
    } else {
      backoff.wait();
    }
    if (num_completed() < ticket.load() && has_passed(deadline)) return false;
  }
  return true;
}

void CPUInfer::execute(std::unique_ptr<Task> task) {
  const uint64_t ticket = num_completed() + 1;
  try {
    const InsideTask inside(this);
    task->run();
  } catch (...) {
    task->outcome()->error = std::current_exception();
    errors_.add(ticket, std::current_exception());
  }
  if (task->ends_anywhere()) {
    task.reset();
  } else {
    finished_.push(std::move(task));
  }
  num_completed_.store(ticket);
  if (lowest_awaited_.load() <= ticket) wake_waiters();
}

// The thread that releases the role hands over the remaining tasks: to a thread that sleeps until the role is
// free, and to the background thread if it has been woken for them.
void CPUInfer::release_role() {
  queue_.release_role();
  if (lowest_awaited_.load() != kNobody) wake_waiters();
  if (num_completed() < background_until_.load()) ring_background();
}

// ---- without it ----

// Waits while another thread has the role, until the ticket is done, the role is free, or just for a while.
// False when the deadline has passed.
bool CPUInfer::await_progress(uint64_t ticket, const Deadline& deadline) {
  const auto can_go_on = [this, ticket] { return num_completed() >= ticket || queue_.is_role_free(); };
  if (spin_until(can_go_on, kWaiterSpin)) return true;
  // The order matters: a thread that makes progress after the last look wakes this one, since it looks for
  // sleepers after that; and progress_ has changed then, so that this one does not fall asleep.
  const uint32_t seen = progress_.load();
  lower_to(lowest_awaited_, ticket);
  if (can_go_on()) return true;
  progress_.sleep_while(seen, deadline);
  return num_completed() >= ticket || !has_passed(deadline);
}

// All of them: those whose time has not come register again.
void CPUInfer::wake_waiters() {
  lowest_awaited_.store(kNobody);
  progress_.bump();
  progress_.wake_all();
}

void CPUInfer::ring_background() {
  bell_.bump();
  bell_.wake(1);
}

void CPUInfer::background_main() {
  while (true) {
    const uint32_t seen = bell_.load();
    const bool has_work = num_completed() < background_until_.load();
    if (has_work && queue_.try_acquire_role()) {
      consume_until(background_until_, {});
      release_role();
    } else if (stopping_.load()) {
      return;
    } else {
      bell_.sleep_while(seen);
    }
  }
}

}  // namespace ktmoe
