// What is used of the CUDA driver, found at run time: nothing of CUDA is needed to build, nor to run without
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ktmoe {

class CudaDriver {
 public:
  using Stream = void*;  // CUstream; null is the default stream
  using Event = void*;   // CUevent
  using HostFunction = void (*)(void* data);

  // The driver, or std::runtime_error that says why there is none. KTMOE_CUDA_DRIVER names another library.
  static const CudaDriver& get();
  static bool is_there();

  // Calls `function` when all earlier work in the stream is done; later work waits for that. The
  // function must not call CUDA. Throws std::runtime_error with the driver's message, as all below.
  void launch(Stream stream, HostFunction function, void* data) const;
  // Whether launched work becomes part of a graph, which may be replayed any number of times.
  bool is_capturing(Stream stream) const;
  // In the stream; addresses of the host or of a device.
  void copy(uint64_t to, uint64_t from, size_t bytes, Stream stream) const;
  // A number that no two streams have; the default stream is another one in every context.
  uint64_t key(Stream stream) const;
  // An event that completes when the stream reaches this point; to be polled.
  Event record_event(Stream stream) const;
  bool is_complete(Event event) const noexcept;  // true: and the event is destroyed
  // Later work in `waiting` waits for the current work in `stream`.
  void wait(Stream waiting, Stream stream) const;
  // Pins memory, so that copies need not wait for the CPU.
  void lock_pages(void* begin, size_t bytes) const;
  void unlock_pages(void* begin) const noexcept;

 private:
  CudaDriver();
  static const CudaDriver* find(std::string& why_not);

  template <class Function>
  void load(Function& function, const char* name);
  void check(int result, const char* what) const;
  void use_context_of(Stream stream) const;
  class InContextOf;

  void* library_ = nullptr;
  int (*init_)(unsigned flags) = nullptr;
  int (*device_count_)(int* count) = nullptr;
  int (*retain_primary_context_)(void** context, int device) = nullptr;
  int (*get_current_context_)(void** context) = nullptr;
  int (*set_current_context_)(void* context) = nullptr;
  int (*stream_context_)(Stream stream, void** context) = nullptr;
  int (*launch_)(Stream stream, HostFunction function, void* data) = nullptr;
  int (*is_capturing_)(Stream stream, int* status) = nullptr;
  int (*copy_)(uint64_t to, uint64_t from, size_t bytes, Stream stream) = nullptr;
  int (*create_event_)(Event* event, unsigned flags) = nullptr;
  int (*record_)(Event event, Stream stream) = nullptr;
  int (*query_)(Event event) = nullptr;
  int (*wait_)(Stream stream, Event event, unsigned flags) = nullptr;
  int (*destroy_event_)(Event event) = nullptr;
  int (*lock_)(void* begin, size_t bytes, unsigned flags) = nullptr;
  int (*unlock_)(void* begin) = nullptr;
  int (*exchange_capture_mode_)(int* mode) = nullptr;
  int (*error_text_)(int result, const char** text) = nullptr;
};

}  // namespace ktmoe
