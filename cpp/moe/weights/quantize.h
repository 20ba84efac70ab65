// Weights to the integers and scales of the quantised formats, by all threads of a pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/registry.h"
#include "kernels/contract_quantize.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// The formats that weights are quantised to.
inline constexpr FormatId kQuantizedFormats[] = {FormatId::kInt8, FormatId::kInt8Group32,
                                                 FormatId::kInt4Group32, FormatId::kInt4Group64,
                                                 FormatId::kInt4Group128};

// Quantises all rows to one of them; the group of `args` is that of the format. Which thread does which row
// changes no bit. Throws std::invalid_argument for the first row that holds NaN or an infinity: of it nothing
// is written, others may be.
void quantize_rows(FormatId format, const kernels::QuantizeArgs& args, WorkerPool& pool);

}  // namespace ktmoe
