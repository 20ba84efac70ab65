// Quantizes weights to integer codes and scales, with all threads of a pool.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "formats/registry.h"
#include "kernels/contract_quantize.h"
#include "moe/methods.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// Whether a method quantizes weights to a format.
constexpr bool is_quantized_format(FormatId format) {
  return std::ranges::any_of(kMethods, [format](const Method& method) {
    return method.weights == WeightSource::kQuantized &&
           std::ranges::find(method.formats(), format) != method.formats().end();
  });
}

constexpr size_t num_quantized_formats() {
  size_t num = 0;
  for (size_t id = 0; id < kNumFormats; ++id) num += is_quantized_format(static_cast<FormatId>(id));
  return num;
}

// The formats that weights are quantized to, in their order.
inline constexpr auto kQuantizedFormats = [] {
  std::array<FormatId, num_quantized_formats()> found{};
  size_t num = 0;
  for (size_t id = 0; id < kNumFormats; ++id) {
    const auto format = static_cast<FormatId>(id);
    if (is_quantized_format(format)) found[num++] = format;
  }
  return found;
}();

// The kernel that quantizes to one of them. Throws std::invalid_argument for another format.
uint32_t (*quantizer(const kernels::KernelTable& table, FormatId format))(const kernels::QuantizeArgs&);

// Quantizes all rows to one of them; the group size of `args` is set from the format. The bits do not depend
// on the number of threads. Throws std::invalid_argument for another format, and for the first row that
// contains NaN or an infinity; nothing of it is written, other rows may be.
void quantize_rows(FormatId format, const kernels::QuantizeArgs& args, WorkerPool& pool);

}  // namespace ktmoe
