// Weights to the integers and scales of the quantised formats, by all threads of a pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/contract_quantize.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

enum class QuantizedFormat : uint8_t { kInt8, kInt8Group32, kInt4Group32, kInt4Group64, kInt4Group128 };

// Whether a row's scale is held apart from its bytes.
inline bool has_row_scale(QuantizedFormat format) { return format != QuantizedFormat::kInt8Group32; }

// Bytes of a row of k weights; contract_quantize.h says what they are.
size_t quantized_row_bytes(QuantizedFormat format, size_t k);

// Quantises all rows; the group of `args` is that of the format. Which thread does which row changes no bit.
// Throws std::invalid_argument for the first row that holds NaN or an infinity: of it nothing is written,
// others may be.
void quantize_rows(QuantizedFormat format, const kernels::QuantizeArgs& args, WorkerPool& pool);

}  // namespace ktmoe
