// The parts of XLA's foreign function interface that are used here, with the memory layout of its C interface
// (versions 0.x). Declared here, so that the build does not need XLA; a test compares it with jaxlib's
// headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktmoe::xla {

struct Extension {
  size_t struct_size;
  int32_t type;
  Extension* next;
};
inline constexpr int32_t kMetadataExtension = 1;

struct ApiVersion {
  size_t struct_size;
  Extension* extensions;
  int major_version, minor_version;
};
inline constexpr int kApiMajor = 0, kOldestApiMinor = 1;

struct Error;  // XLA's own

enum class ErrorCode : int32_t {
  kInvalidArgument = 3,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kOutOfRange = 11,
  kInternal = 13,
};

struct ErrorCreateArgs {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct StreamGetArgs {
  size_t struct_size;
  Extension* extensions;
  void* context;
  void* stream;  // result: CUDA's handle
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  ApiVersion version;
  const void* internal;
  Error* (*create_error)(ErrorCreateArgs*);
  void* not_used[3];
  Error* (*get_stream)(StreamGetArgs*);
  // More functions follow.
};

enum class DataType : int32_t { kInt32 = 4, kInt64 = 5, kUint32 = 8, kFloat32 = 11, kBf16 = 16 };

struct Buffer {
  size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

// Arguments, and as well results.
struct Buffers {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int32_t* types;
  void** values;
};
inline constexpr int32_t kIsBuffer = 1;

struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int32_t* types;
  void** names;
  void** values;
};

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  void* context;
  int32_t stage;
  Buffers args, rets;
  Attributes attributes;
};
inline constexpr int32_t kExecuteStage = 3;

struct Metadata {
  size_t struct_size;
  ApiVersion version;
  uint32_t traits;
  // A type of state may follow.
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

using Handler = Error*(CallFrame*);

}  // namespace ktmoe::xla
