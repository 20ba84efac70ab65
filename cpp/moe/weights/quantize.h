// Weights to the integers and scales of the quantised formats, by all threads of a pool.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <ranges>

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

// The formats that weights are quantized to, in their order.
inline constexpr auto kQuantizedFormats = [] {
  constexpr auto ids = std::views::iota(size_t{0}, kNumFormats);
  constexpr auto is_one = [](size_t id) { return is_quantized_format(static_cast<FormatId>(id)); };
  std::array<FormatId, std::ranges::count_if(ids, is_one)> found{};
  auto next = found.begin();
  for (size_t id : ids)
    if (is_one(id)) *next++ = static_cast<FormatId>(id);
  return found;
}();

// Quantises all rows to one of them; the group of `args` is that of the format. Which thread does which row
// changes no bit. Throws std::invalid_argument for the first row that holds NaN or an infinity: of it nothing
// is written, others may be.
void quantize_rows(FormatId format, const kernels::QuantizeArgs& args, WorkerPool& pool);

}  // namespace ktmoe
