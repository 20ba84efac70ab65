// The lists behind the task queue.
#include "runtime/task_queue.h"

#include "core/error.h"

namespace ktmoe {

TaskList::~TaskList() {
  while (pop_front()) {
  }
}

size_t TaskList::size() const {
  size_t num_tasks = 0;
  for (const Task* task = first_; task != nullptr; task = task->next_) ++num_tasks;
  return num_tasks;
}

std::unique_ptr<Task> TaskList::pop_front() {
  std::unique_ptr<Task> task(first_);
  if (task) first_ = std::exchange(task->next_, nullptr);
  return task;
}

void TaskList::insert_by_ticket(std::unique_ptr<Task> task) {
  Task** place = &first_;
  while (*place != nullptr && (*place)->ticket_ < task->ticket_) place = &(*place)->next_;
  task->next_ = *place;
  *place = task.release();
}

void TaskStack::push(std::unique_ptr<Task> task) {
  Task* const top = task.release();
  top->next_ = top_.load(std::memory_order_relaxed);
  while (!top_.compare_exchange_weak(top->next_, top, std::memory_order_release, std::memory_order_relaxed)) {
  }
}

TaskList TaskStack::take_all() {
  if (top_.load(std::memory_order_relaxed) == nullptr) return {};
  return TaskList(top_.exchange(nullptr, std::memory_order_acquire));
}

uint64_t TaskQueue::push(std::unique_ptr<Task> task) {
  uint64_t last = tickets_.load();
  do {
    if (last & kClosed) throw_runtime("the engine has been shut down and takes no more tasks");
  } while (!tickets_.compare_exchange_weak(last, last + 1));
  task->ticket_ = last + 1;
  inbox_.push(std::move(task));
  return last + 1;
}

uint64_t TaskQueue::close() { return tickets_.fetch_or(kClosed) & ~kClosed; }

std::unique_ptr<Task> TaskQueue::pop() {
  const auto is_here = [this] {
    return ready_.front() != nullptr && ready_.front()->ticket_ == next_ticket_;
  };
  if (!is_here()) {
    // The inbox comes with the last first, so nearly every task goes to the very front.
    TaskList fresh = inbox_.take_all();
    while (std::unique_ptr<Task> task = fresh.pop_front()) ready_.insert_by_ticket(std::move(task));
  }
  if (!is_here()) return nullptr;
  ++next_ticket_;
  return ready_.pop_front();
}

void TaskQueue::abandon() {
  inbox_.take_all().leak();
  ready_.leak();
}

}  // namespace ktmoe
