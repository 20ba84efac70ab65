#include "moe/layer/gemm_kernel.h"

#include <cstdint>

#include "core/error.h"

namespace ktmoe {
namespace {

[[noreturn]] void refuse(const GeneralMOEConfig& config, const char* expected) {
  throw_invalid("group_size: got ", config.group_size, ", expected ", expected);
}

FormatId int4_format(const GeneralMOEConfig& config) {
  switch (config.group_size) {
    case 0:
    case 32: return FormatId::kInt4Group32;
    case 64: return FormatId::kInt4Group64;
    case 128: return FormatId::kInt4Group128;
    default: refuse(config, "32, 64 or 128");
  }
}

GemmKernel checked(const GemmKernel& kernel, const GeneralMOEConfig& config) {
  constexpr int64_t kMost = INT32_MAX / (127 * 127);
  const auto check = [=](const char* name, int64_t size) {
    if (size > kMost)
      throw_invalid(name, ": got ", size, ", expected at most ", kMost, ": sums of int8 products are int32");
  };
  check("hidden_size", config.hidden_size);
  check("intermediate_size", config.intermediate_size);
  return kernel;
}

FormatId rawint4_format(const GeneralMOEConfig& config) {
  switch (config.group_size) {
    case 0:
    case 32: return FormatId::kRawInt4Group32;
    case 64: return FormatId::kRawInt4Group64;
    case 128: return FormatId::kRawInt4Group128;
    default: refuse(config, "32, 64 or 128");
  }
}

}  // namespace

void refuse_group_size(const GeneralMOEConfig& config) {
  if (config.group_size != 0) refuse(config, "0: the encoding says what shares a scale");
}

GemmKernel amx_int8_kernel(const GeneralMOEConfig& config) {
  if (config.group_size != 0) refuse(config, "0: integer products take scales of rows");
  return checked(GemmKernel224Int8, config);
}

GemmKernel amx_int4_kernel(const GeneralMOEConfig& config) {
  GemmKernel kernel = GemmKernel224Int4;
  kernel.format = int4_format(config);
  return checked(kernel, config);
}

GemmKernel int8_kernel(const GeneralMOEConfig& config) {
  switch (config.group_size) {
    case 0: return {FormatId::kInt8, false};
    case 32: return {FormatId::kInt8Group32, false};
    default: refuse(config, "0 or 32");
  }
}

GemmKernel llamafile_kernel(const GeneralMOEConfig& config) {
  refuse_group_size(config);
  return {std::nullopt, false};
}

GemmKernel rawint4_kernel(const GeneralMOEConfig& config) { return {rawint4_format(config), false}; }

GemmKernel int4_kernel(const GeneralMOEConfig& config) { return {int4_format(config), false}; }

}  // namespace ktmoe
