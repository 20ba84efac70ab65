#include "xla/cuda_calls.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "runtime/per_process.h"
#include "runtime/stream_session.h"

namespace ktmoe::xla {
namespace {

// Not those of Python's calls.
struct XlaCalls : StreamCalls {};
StreamCalls& stream_calls() { return of_this_process<XlaCalls>(); }

size_t bytes_of(const Buffer& buffer) {
  size_t bytes = 0;
  switch (buffer.dtype) {
    case DataType::kBf16: bytes = 2; break;
    case DataType::kInt32:
    case DataType::kUint32:
    case DataType::kFloat32: bytes = 4; break;
    case DataType::kInt64: bytes = 8; break;
    default: throw_invalid("got an array of another dtype than bfloat16, float32, int32, uint32, int64");
  }
  for (int64_t i = 0; i < buffer.rank; ++i) bytes *= static_cast<size_t>(buffer.dims[i]);
  return bytes;
}

// Arrays of a call as they are on the host.
class HostBuffers {
 public:
  explicit HostBuffers(const Buffers& of) {
    for (int64_t i = 0; i < of.size; ++i) {
      if (of.types[i] != kIsBuffer) throw_invalid("got an argument that is no array");
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

  // Gives them memory one after the other; returns what is behind them.
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

  void copy(CudaDriver::Stream stream, bool to_host) const {
    for (size_t i = 0; i < buffers_.size(); ++i) {
      const auto host = reinterpret_cast<uint64_t>(buffers_[i].data);
      const auto device = reinterpret_cast<uint64_t>(on_device_[i]);
      CudaDriver::get().copy(to_host ? host : device, to_host ? device : host, bytes_[i], stream);
    }
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

// Memory of the host whose pages are locked.
class LockedBlock {
 public:
  explicit LockedBlock(size_t bytes) : memory_(bytes) { CudaDriver::get().lock_pages(memory_.data(), bytes); }
  ~LockedBlock() { CudaDriver::get().unlock_pages(memory_.data()); }
  LockedBlock(const LockedBlock&) = delete;
  LockedBlock& operator=(const LockedBlock&) = delete;

  std::byte* data() const { return memory_.data(); }
  size_t bytes() const { return memory_.capacity(); }

 private:
  AlignedBuffer memory_;
};

// One for each stream: its calls come one after the other, and so does what they copy.
class Blocks {
 public:
  std::byte* at_least(size_t bytes, CudaDriver::Stream stream) {
    std::shared_ptr<LockedBlock>& block = blocks_[stream];
    if (block == nullptr || block->bytes() < bytes) {
      size_t size = kSmallest;
      while (size < bytes) size *= 2;
      auto larger = std::make_shared<LockedBlock>(size);
      if (block != nullptr) stream_calls().hold(stream, block);  // until calls before are done with it
      block = std::move(larger);
    }
    return block->data();
  }

  std::mutex mutex;  // of the blocks, and of the calls that use one

 private:
  static constexpr size_t kSmallest = size_t{2} << 20;  // a huge page

  std::unordered_map<CudaDriver::Stream, std::shared_ptr<LockedBlock>> blocks_;
};

CudaDriver::Stream stream_of(const CallFrame& frame) {
  StreamGetArgs args{sizeof(StreamGetArgs), nullptr, frame.context, nullptr};
  if (frame.api->get_stream(&args) != nullptr) throw_runtime("XLA gives no stream");
  if (CudaDriver::get().is_capturing(args.stream))
    throw_runtime("got a stream that is being captured, expected a program that is run call by call");
  return args.stream;
}

}  // namespace

Error* enqueue(CallFrame* frame, const Operation& operation) {
  return answer(frame, operation.name, [&] {
    stream_calls().forget_happened();
    rethrow_error();
    const CudaDriver::Stream stream = stream_of(*frame);
    const auto host = std::make_shared<HostFrame>(*frame);
    auto& blocks = of_this_process<Blocks>();
    const std::lock_guard lock(blocks.mutex);
    std::byte* args = blocks.at_least(host->args.bytes() + host->rets.bytes(), stream);
    std::byte* rets = host->args.place(args);
    std::byte* end = host->rets.place(rets);
    host->args.copy(stream, /*to_host=*/true);
    const auto work = [host, operation] {
      CallFrame on_host{};
      on_host.args = host->args.view(), on_host.rets = host->rets.view();
      Call call(on_host);
      operation.work(call);
    };
    stream_calls().call(stream, work, {rets, end});
    host->rets.copy(stream, /*to_host=*/false);
  });
}

void rethrow_error() { stream_calls().rethrow(); }

}  // namespace ktmoe::xla
