#include "xla/cuda_calls.h"

#include <memory>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "runtime/stream_session.h"

namespace ktmoe::xla {
namespace {

size_t bytes_of(const Buffer& buffer) {
  size_t bytes = 0;
  switch (buffer.dtype) {
    case DataType::kBf16: bytes = 2; break;
    case DataType::kInt32:
    case DataType::kUint32:
    case DataType::kFloat32: bytes = 4; break;
    case DataType::kInt64: bytes = 8; break;
    default: throw_invalid("arrays: got another dtype, expected bfloat16, float32, int32, uint32 or int64");
  }
  for (int64_t i = 0; i < buffer.rank; ++i) bytes *= static_cast<size_t>(buffer.dims[i]);
  return bytes;
}

// Arrays of a call as they are on the host.
class HostBuffers {
 public:
  explicit HostBuffers(const Buffers& of) {
    for (int64_t i = 0; i < of.size; ++i) {
      if (of.types[i] != kIsBuffer) throw_invalid("arguments: got none, expected an array");
      const auto& buffer = *static_cast<const Buffer*>(of.values[i]);
      dims_.emplace_back(buffer.dims, buffer.dims + buffer.rank);
      on_device_.push_back(buffer.data), buffers_.push_back(buffer), bytes_.push_back(bytes_of(buffer));
    }
    types_.assign(buffers_.size(), kIsBuffer);
    for (size_t i = 0; i < buffers_.size(); ++i) {
      buffers_[i].dims = dims_[i].data();
      values_.push_back(&buffers_[i]);
    }
  }
  HostBuffers(const HostBuffers&) = delete;
  HostBuffers& operator=(const HostBuffers&) = delete;

  // Assigns them memory one after the other; returns the end of it.
  std::byte* place(std::byte* at) {
    for (size_t i = 0; i < buffers_.size(); ++i) {
      buffers_[i].data = at;
      at += round_up(bytes_[i], kCacheLine);
    }
    return at;
  }
  size_t bytes() const {
    size_t sum = 0;
    for (const size_t bytes : bytes_) sum += round_up(bytes, kCacheLine);
    return sum;
  }

  Buffers view() {
    return {sizeof(Buffers), nullptr, static_cast<int64_t>(values_.size()), types_.data(), values_.data()};
  }

  std::vector<DeviceCopy> copies() const {
    std::vector<DeviceCopy> all;
    for (size_t i = 0; i < buffers_.size(); ++i)
      all.push_back({reinterpret_cast<uint64_t>(on_device_[i]), buffers_[i].data, bytes_[i]});
    return all;
  }

 private:
  std::vector<std::vector<int64_t>> dims_;
  std::vector<void*> on_device_;
  std::vector<Buffer> buffers_;
  std::vector<size_t> bytes_;
  std::vector<int32_t> types_;
  std::vector<void*> values_;
};

struct HostFrame {
  explicit HostFrame(const CallFrame& of) : args(of.args), rets(of.rets) {}
  HostBuffers args, rets;
};

CudaDriver::Stream stream_of(const CallFrame& frame) {
  StreamGetArgs args{sizeof(StreamGetArgs), nullptr, frame.context, nullptr};
  if (frame.api->get_stream(&args) != nullptr) throw_runtime("XLA gives no stream");
  if (CudaDriver::get().is_capturing(args.stream))
    throw_runtime("stream: got one that is being captured, expected a program that is run call by call");
  return args.stream;
}

}  // namespace

Error* enqueue(CallFrame* frame, const Operation& operation) {
  return answer(frame, operation.name, [&] {
    constexpr auto kAnyThread = StreamSession::Destroyer::kAnyThread;  // nothing of a call is Python's
    StreamSession& session = StreamSession::of_process();
    session.release_done(kAnyThread);
    session.rethrow();
    const CudaDriver::Stream stream = stream_of(*frame);
    const auto host = std::make_shared<HostFrame>(*frame);
    const auto staging = session.lease_staging(stream, host->args.bytes() + host->rets.bytes());
    std::byte* rets = host->args.place(staging.data());
    std::byte* end = host->rets.place(rets);
    session.copy_to_host(stream, host->args.copies());
    const auto work = [host, operation] {
      CallFrame on_host{};
      on_host.args = host->args.view(), on_host.rets = host->rets.view();
      Call call(on_host);
      operation.work(call);
    };
    session.call(stream, work, {rets, end}, kAnyThread);
    session.copy_to_device(stream, host->rets.copies());
  });
}

}  // namespace ktmoe::xla
