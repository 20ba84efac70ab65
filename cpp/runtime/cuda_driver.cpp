#include "runtime/cuda_driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <exception>

#include "core/error.h"

namespace ktmoe {
namespace {

const char* library_name() {
  const char* other = std::getenv("KTMOE_CUDA_DRIVER");
  return other != nullptr ? other : "libcuda.so.1";
}

// Locked for all contexts, which is what several GPUs need.
constexpr unsigned kPortable = 1;

// Not for measuring time.
constexpr unsigned kWithoutTiming = 2;
constexpr int kNotReady = 600;

// While a stream is being captured, a thread may call the driver outside of streams only in relaxed mode.
constexpr int kRelaxedCapture = 2;
class RelaxedCapture {
 public:
  explicit RelaxedCapture(int (*exchange)(int* mode)) : exchange_(exchange) { exchange_(&mode_); }
  ~RelaxedCapture() { exchange_(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int (*exchange_)(int* mode);
  int mode_ = kRelaxedCapture;
};

}  // namespace

template <class Function>
void CudaDriver::load(Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library_, name));
  if (function == nullptr) throw_runtime("cuda: ", library_name(), " has no ", name);
}

CudaDriver::CudaDriver() {
  library_ = dlopen(library_name(), RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) throw_runtime("cuda: no driver: ", dlerror());
  load(init_, "cuInit");
  load(device_count_, "cuDeviceGetCount");
  load(retain_primary_context_, "cuDevicePrimaryCtxRetain");
  load(get_current_context_, "cuCtxGetCurrent");
  load(set_current_context_, "cuCtxSetCurrent");
  load(stream_context_, "cuStreamGetCtx");
  load(launch_, "cuLaunchHostFunc");
  load(is_capturing_, "cuStreamIsCapturing");
  load(copy_, "cuMemcpyAsync");
  load(create_event_, "cuEventCreate");
  load(record_, "cuEventRecord");
  load(query_, "cuEventQuery");
  load(wait_, "cuStreamWaitEvent");
  load(destroy_event_, "cuEventDestroy_v2");
  load(lock_, "cuMemHostRegister_v2");
  load(unlock_, "cuMemHostUnregister");
  load(exchange_capture_mode_, "cuThreadExchangeStreamCaptureMode");
  load(error_text_, "cuGetErrorString");
  check(init_(0), "cuInit");
  int count = 0;
  check(device_count_(&count), "cuDeviceGetCount");
  if (count == 0) throw_runtime("cuda: the driver finds no GPU");
}

const CudaDriver* CudaDriver::find(std::string& why_not) {
  static std::string reason;
  // Kept until the process is gone: streams may call back until then.
  static const CudaDriver* driver = []() -> const CudaDriver* {
    try {
      return new CudaDriver;
    } catch (const std::exception& e) {
      reason = e.what();
      return nullptr;
    }
  }();
  why_not = reason;
  return driver;
}

const CudaDriver& CudaDriver::get() {
  std::string why_not;
  const CudaDriver* driver = find(why_not);
  if (driver == nullptr) throw std::runtime_error(why_not);
  return *driver;
}

bool CudaDriver::is_there() {
  std::string why_not;
  return find(why_not) != nullptr;
}

void CudaDriver::check(int result, const char* what) const {
  if (result == 0) return;
  const char* text = nullptr;
  if (error_text_(result, &text) != 0 || text == nullptr) text = "unknown error";
  throw_runtime("cuda: ", what, ": ", text, " (", result, ")");
}

// The driver's calls need a context; a thread that has not called CUDA has none.
void CudaDriver::use_context_of(Stream stream) const {
  void* context = nullptr;
  check(get_current_context_(&context), "cuCtxGetCurrent");
  if (context != nullptr) return;
  if (stream != nullptr) {
    check(stream_context_(stream, &context), "cuStreamGetCtx");
  } else {
    check(retain_primary_context_(&context, 0), "cuDevicePrimaryCtxRetain");
  }
  check(set_current_context_(context), "cuCtxSetCurrent");
}

void CudaDriver::launch(Stream stream, HostFunction function, void* data) const {
  use_context_of(stream);
  check(launch_(stream, function, data), "cuLaunchHostFunc");
}

bool CudaDriver::is_capturing(Stream stream) const {
  use_context_of(stream);
  int status = 0;
  check(is_capturing_(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

void CudaDriver::copy(uint64_t to, uint64_t from, size_t bytes, Stream stream) const {
  if (bytes == 0) return;
  use_context_of(stream);
  check(copy_(to, from, bytes, stream), "cuMemcpyAsync");
}

uint64_t CudaDriver::key(Stream stream) const {
  if (stream != nullptr) return reinterpret_cast<uint64_t>(stream);
  use_context_of(stream);
  void* context = nullptr;
  check(get_current_context_(&context), "cuCtxGetCurrent");
  return reinterpret_cast<uint64_t>(context);
}

// An event belongs to the context that is current when it is made, which must be its stream's: that of
// another GPU, perhaps.
class CudaDriver::InContextOf {
 public:
  InContextOf(const CudaDriver& driver, Stream stream) : driver_(driver) {
    driver.use_context_of(stream);
    if (stream == nullptr) return;
    driver.check(driver.get_current_context_(&before_), "cuCtxGetCurrent");
    void* context = nullptr;
    driver.check(driver.stream_context_(stream, &context), "cuStreamGetCtx");
    if (context == before_) {
      before_ = nullptr;
    } else {
      driver.check(driver.set_current_context_(context), "cuCtxSetCurrent");
    }
  }
  ~InContextOf() {
    if (before_ != nullptr) driver_.set_current_context_(before_);
  }
  InContextOf(const InContextOf&) = delete;
  InContextOf& operator=(const InContextOf&) = delete;

 private:
  const CudaDriver& driver_;
  void* before_ = nullptr;  // to be current again
};

CudaDriver::Event CudaDriver::record_event(Stream stream) const {
  const InContextOf context(*this, stream);
  Event event = nullptr;
  check(create_event_(&event, kWithoutTiming), "cuEventCreate");
  const int result = record_(event, stream);
  if (result != 0) destroy_event_(event);
  check(result, "cuEventRecord");
  return event;
}

bool CudaDriver::is_complete(Event event) const noexcept {
  const RelaxedCapture relaxed(exchange_capture_mode_);
  if (query_(event) == kNotReady) return false;
  destroy_event_(event);
  return true;
}

void CudaDriver::wait(Stream waiting, Stream stream) const {
  const Event event = record_event(stream);
  const int result = wait_(waiting, event, 0);
  destroy_event_(event);  // the driver does so when nothing waits for it any more
  check(result, "cuStreamWaitEvent");
}

void CudaDriver::lock_pages(void* begin, size_t bytes) const {
  if (bytes == 0) return;
  use_context_of(nullptr);
  const RelaxedCapture relaxed(exchange_capture_mode_);
  check(lock_(begin, bytes, kPortable), "cuMemHostRegister");
}

void CudaDriver::unlock_pages(void* begin) const noexcept {
  const RelaxedCapture relaxed(exchange_capture_mode_);
  unlock_(begin);
}

}  // namespace ktmoe
