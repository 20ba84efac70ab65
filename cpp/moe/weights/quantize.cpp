#include "moe/weights/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "formats/registry.h"
#include "kernels/table.h"

namespace ktmoe {
namespace {

using kernels::QuantizeArgs;

ptrdiff_t item_bytes(const QuantizeArgs& a) {
  return a.type == kernels::FloatType::kBf16 ? sizeof(bf16) : sizeof(float);
}

const std::byte* row_of(const QuantizeArgs& a, uint32_t n) {
  return static_cast<const std::byte*>(a.rows) + static_cast<ptrdiff_t>(n) * a.stride * item_bytes(a);
}

QuantizeArgs rows_from(const QuantizeArgs& all, uint32_t first, uint32_t count) {
  QuantizeArgs part = all;
  part.rows = row_of(all, first), part.n = count;
  part.codes = all.codes + first * all.codes_stride;
  if (all.channel_scale != nullptr) part.channel_scale = all.channel_scale + first;
  return part;
}

bool holds_nan(const QuantizeArgs& a, uint32_t n) {
  const std::byte* row = row_of(a, n);
  for (size_t i = 0; i < a.k; ++i, row += item_bytes(a)) {
    uint32_t bits = 0;
    if (a.type == kernels::FloatType::kBf16) {
      uint16_t high;
      std::memcpy(&high, row, sizeof high);
      bits = uint32_t{high} << 16;
    } else {
      std::memcpy(&bits, row, sizeof bits);
    }
    if ((bits & 0x7fffffffu) > 0x7f800000u) return true;
  }
  return false;
}

}  // namespace

uint32_t (*quantizer(const kernels::KernelTable& table, FormatId format))(const QuantizeArgs&) {
  switch (format) {
    case FormatId::kInt8: return table.quantize_int8;
    case FormatId::kInt8Group32: return table.quantize_int8_group;
    case FormatId::kInt4Group32:
    case FormatId::kInt4Group64:
    case FormatId::kInt4Group128: return table.quantize_int4;
    default:
      throw_invalid("format: got ", format_name(format), ", expected one that weights are quantized to");
  }
}

void quantize_rows(FormatId format, const QuantizeArgs& args, WorkerPool& pool) {
  // Tens of microseconds of work, so that scheduling costs nothing in comparison.
  constexpr uint32_t kWeightsPerTask = 1u << 16;
  QuantizeArgs all = args;
  all.group = static_cast<uint32_t>(format_group(format).value_or(all.group));
  const auto kernel = quantizer(kernels::active_table(), format);
  const uint32_t rows = std::max(1u, kWeightsPerTask / std::max(1u, all.k));
  std::atomic<uint32_t> first_wrong{all.n};
  pool.run(static_cast<uint32_t>(div_up(all.n, rows)), [&](const Worker&, int, uint32_t task) {
    const uint32_t first = task * rows, count = std::min(rows, all.n - first);
    uint32_t known = first_wrong.load(std::memory_order_relaxed);
    if (known < first) return;
    const uint32_t wrong = kernel(rows_from(all, first, count));
    if (wrong == count) return;
    while (first + wrong < known && !first_wrong.compare_exchange_weak(known, first + wrong)) {
    }
  });
  const uint32_t wrong = first_wrong.load();
  if (wrong == all.n) return;
  throw_invalid("row ", wrong, ": got ", holds_nan(all, wrong) ? "nan" : "inf", ", expected finite weights");
}

}  // namespace ktmoe
