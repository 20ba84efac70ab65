// A CUDA driver for tests without a GPU: streams are threads that do what they are given in order, memory of
// a device is the host's, and a stream that is being captured keeps what it is given, to be replayed.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Work = std::function<void()>;

class Stream {
 public:
  Stream() : thread_([this] { main(); }) { thread_.detach(); }

  void add(Work work) {
    const std::lock_guard lock(mutex_);
    if (is_capturing) {
      captured.push_back(std::move(work));
      return;
    }
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }

  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return queue_.empty() && !is_busy_; });
  }

  bool is_capturing = false;
  std::vector<Work> captured;

 private:
  void main() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return !queue_.empty(); });
      const Work work = std::move(queue_.front());
      queue_.pop_front();
      is_busy_ = true;
      lock.unlock();
      work();
      lock.lock();
      is_busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  bool is_busy_ = false;
  std::thread thread_;
};

constexpr int kInvalidHandle = 400;

std::mutex mutex;
std::set<void*>& streams() {
  static auto* all = new std::set<void*>;
  return *all;
}
std::set<void*>& locked() {
  static auto* all = new std::set<void*>;
  return *all;
}
int num_captures = 0, num_locks = 0;
thread_local void* context = nullptr;
thread_local int capture_mode = 0;

Stream* find(void* handle) {
  static auto* standard = new Stream;
  if (handle == nullptr) return standard;
  const std::lock_guard lock(mutex);
  return streams().count(handle) != 0 ? static_cast<Stream*>(handle) : nullptr;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) {
  const char* none = std::getenv("FAKE_CUDA_NO_GPU");
  *count = none == nullptr ? 1 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** of, int) { return *of = &mutex, 0; }
int cuCtxGetCurrent(void** current) { return *current = context, 0; }
int cuCtxSetCurrent(void* given) { return context = given, 0; }
int cuStreamGetCtx(void* stream, void** of) { return *of = &mutex, find(stream) ? 0 : kInvalidHandle; }
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  Stream* found = find(stream);
  if (found == nullptr) return kInvalidHandle;
  found->add([=] { function(data); });
  return 0;
}
int cuStreamIsCapturing(void* stream, int* status) {
  Stream* found = find(stream);
  if (found == nullptr) return kInvalidHandle;
  *status = found->is_capturing ? 1 : 0;
  return 0;
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  Stream* found = find(stream);
  if (found == nullptr) return kInvalidHandle;
  found->add([=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
  return 0;
}
int cuEventCreate(void** event, unsigned) {
  static auto* all = new std::deque<std::atomic<bool>>;  // a stream may wait for one that is destroyed
  const std::lock_guard lock(mutex);
  return *event = &all->emplace_back(false), 0;
}
int cuEventRecord(void* event, void* stream) {
  Stream* found = find(stream);
  if (found == nullptr) return kInvalidHandle;
  found->add([=] { static_cast<std::atomic<bool>*>(event)->store(true); });
  return 0;
}
int cuEventQuery(void* event) {
  {
    const std::lock_guard lock(mutex);
    if (num_captures > 0 && capture_mode != 2) return 900;
  }
  return static_cast<std::atomic<bool>*>(event)->load() ? 0 : 600;
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  Stream* found = find(stream);
  if (found == nullptr) return kInvalidHandle;
  const auto* happened = static_cast<std::atomic<bool>*>(event);
  found->add([=] {
    while (!happened->load()) std::this_thread::sleep_for(std::chrono::microseconds(50));
  });
  return 0;
}
int cuEventDestroy_v2(void*) { return 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, capture_mode), 0; }
int cuMemHostRegister_v2(void* begin, size_t, unsigned) {
  const std::lock_guard lock(mutex);
  if (num_captures > 0 && capture_mode != 2) return 900;
  ++num_locks;
  return locked().insert(begin).second ? 0 : 712;
}
int cuMemHostUnregister(void* begin) {
  const std::lock_guard lock(mutex);
  if (num_captures > 0 && capture_mode != 2) return 900;
  return locked().erase(begin) == 1 ? 0 : 713;
}
int cuGetErrorString(int result, const char** text) {
  *text = result == kInvalidHandle ? "invalid resource handle" : "some error";
  return 0;
}

// ---- for tests alone ----

void* fake_stream_create() {
  auto* stream = new Stream;
  const std::lock_guard lock(mutex);
  streams().insert(stream);
  return stream;
}
void fake_stream_destroy(void* stream) {
  const std::lock_guard lock(mutex);
  streams().erase(stream);
}
void fake_stream_create_again(void* stream) {
  const std::lock_guard lock(mutex);
  streams().insert(stream);
}
void fake_stream_synchronize(void* stream) { find(stream)->synchronize(); }
void fake_capture(void* stream, int begin) {
  find(stream)->is_capturing = begin != 0;
  const std::lock_guard lock(mutex);
  num_captures += begin != 0 ? 1 : -1;
}
void fake_stall(void* stream, int milliseconds) {
  find(stream)->add([=] { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); });
}
void fake_replay(void* stream) {
  Stream* found = find(stream);
  for (const Work& work : found->captured) found->add(work);
}
int fake_num_locks() {
  const std::lock_guard lock(mutex);
  return num_locks;
}
int fake_num_locked() {
  const std::lock_guard lock(mutex);
  return static_cast<int>(locked().size());
}
}
