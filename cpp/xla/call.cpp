#include "xla/call.h"

#include <new>
#include <stdexcept>
#include <string>

#include "core/error.h"

namespace ktmoe::xla {
namespace {

const char* dtype_name(DataType dtype) {
  switch (dtype) {
    case DataType::kInt32: return "int32";
    case DataType::kInt64: return "int64";
    case DataType::kUint32: return "uint32";
    case DataType::kFloat32: return "float32";
    case DataType::kBf16: return "bfloat16";
  }
  return "another dtype";
}

std::string describe(const Buffer& b) {
  std::string text = str_cat(dtype_name(b.dtype), " [");
  for (int64_t i = 0; i < b.rank; ++i) text += str_cat(i == 0 ? "" : ", ", b.dims[i]);
  return text + "]";
}

int64_t num_elements(const Buffer& b) {
  int64_t num = 1;
  for (int64_t i = 0; i < b.rank; ++i) num *= b.dims[i];
  return num;
}

Error* error(const Api& api, ErrorCode code, const char* name, const char* what) {
  const std::string message = str_cat(name, ": ", what);
  ErrorCreateArgs args{sizeof(ErrorCreateArgs), nullptr, message.c_str(), code};
  return api.create_error(&args);
}

// XLA queries each handler once for its interface version. The answer is the version of the caller, since the
// few parts used here are the same in all versions.
bool answers_metadata(CallFrame& frame) {
  for (Extension* e = frame.extensions; e != nullptr; e = e->next) {
    if (e->type != kMetadataExtension) continue;
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(e)->metadata;
    const ApiVersion& theirs = frame.api->version;
    const bool known = theirs.major_version == kApiMajor && theirs.minor_version >= kOldestApiMinor;
    metadata.version.major_version = kApiMajor;
    metadata.version.minor_version = known ? theirs.minor_version : kOldestApiMinor;
    metadata.traits = 0;
    return true;
  }
  return false;
}

}  // namespace

const Buffer& Call::next(const Buffers& all, int64_t i, const char* name) {
  if (i >= all.size || all.types[i] != kIsBuffer) throw_invalid(name, ": got none, expected an array");
  return *static_cast<const Buffer*>(all.values[i]);
}

Rows rows_of(const Buffer& buffer, const char* name, DataType dtype, int64_t width, int64_t num) {
  const int64_t got = buffer.rank > 0 && width > 0 ? num_elements(buffer) / width : -1;
  if (buffer.dtype != dtype || buffer.rank < 1 || buffer.dims[buffer.rank - 1] != width ||
      (num >= 0 && got != num))
    throw_invalid(name, ": got ", describe(buffer), ", expected ", dtype_name(dtype), " [",
                  num >= 0 ? str_cat(num) : std::string("T"), ", ", width, "]");
  return {&buffer, got};
}

void* elements_of(const Buffer& buffer, const char* name, DataType dtype, int64_t num) {
  if (buffer.dtype != dtype || num_elements(buffer) != num)
    throw_invalid(name, ": got ", describe(buffer), ", expected ", num, " of ", dtype_name(dtype));
  return buffer.data;
}

Error* answer(CallFrame* frame, const char* name, FunctionRef<void()> work) {
  if (answers_metadata(*frame)) return nullptr;
  const Api& api = *frame->api;
  try {
    if (frame->stage != kExecuteStage)
      throw_runtime("stage: got ", frame->stage, ", expected ", kExecuteStage);
    work();
    return nullptr;
  } catch (const std::invalid_argument& e) {
    return error(api, ErrorCode::kInvalidArgument, name, e.what());
  } catch (const std::out_of_range& e) {
    return error(api, ErrorCode::kOutOfRange, name, e.what());
  } catch (const std::bad_alloc&) {
    return error(api, ErrorCode::kResourceExhausted, name, "not enough memory");
  } catch (const std::runtime_error& e) {
    return error(api, ErrorCode::kFailedPrecondition, name, e.what());
  } catch (const std::exception& e) {
    return error(api, ErrorCode::kInternal, name, e.what());
  }
}

}  // namespace ktmoe::xla
