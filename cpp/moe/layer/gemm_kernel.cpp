#include "moe/layer/gemm_kernel.h"

#include <cstdint>
#include <string>

#include "core/error.h"
#include "formats/registry.h"

namespace ktmoe {
namespace {

[[noreturn]] void throw_group_size(int64_t got, std::string_view expected) {
  throw_invalid("group_size: got ", got, ", expected ", expected);
}

// 0 stands for one scale per row.
int64_t group_size_of(FormatId format) { return static_cast<int64_t>(format_group(format).value_or(0)); }

// "32, 64 or 128", the default first.
std::string group_sizes_of(const Method& method) {
  std::string sizes;
  for (size_t i = 0; i < method.num_formats; ++i) {
    if (i > 0) sizes += i + 1 < method.num_formats ? ", " : " or ";
    sizes += std::to_string(group_size_of(method.formats()[i]));
  }
  return sizes;
}

// The format that the config's group size chooses; 0 means the default.
FormatId chosen_format(const Method& method, int64_t group_size) {
  if (group_size == 0) return method.formats().front();
  if (method.num_formats == 1)
    throw_group_size(group_size, method.product == ProductType::kInt8
                                     ? "0: int8 products need per-channel scales"
                                     : "0: the encoding has its own block size");
  for (FormatId format : method.formats())
    if (group_size_of(format) == group_size) return format;
  throw_group_size(group_size, group_sizes_of(method));
}

// Sums of int8 products must not overflow.
void check_sums(const GeneralMOEConfig& config) {
  constexpr int64_t kMost = INT32_MAX / (127 * 127);
  const auto check = [=](const char* name, int64_t size) {
    if (size > kMost)
      throw_invalid(name, ": got ", size, ", expected at most ", kMost, ": sums of int8 products are int32");
  };
  check("hidden_size", config.hidden_size);
  check("intermediate_size", config.intermediate_size);
}

}  // namespace

GemmKernel gemm_kernel(const Method& method, const GeneralMOEConfig& config) {
  const bool is_integer = method.product == ProductType::kInt8;
  if (method.formats().empty()) {
    if (config.group_size != 0) throw_group_size(config.group_size, "0: the encoding has its own block size");
    return {std::nullopt, is_integer};
  }
  const FormatId format = chosen_format(method, config.group_size);
  if (is_integer) check_sums(config);
  return {format, is_integer};
}

}  // namespace ktmoe
