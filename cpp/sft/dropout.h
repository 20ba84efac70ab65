// Dropout masks from a counter-based generator, so that a repeated pass draws the same ones. The kernels draw
// and apply them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/contract_elementwise.h"

namespace ktmoe {

using kernels::DropoutKey;
using kernels::mask_row_bytes;

// The bits of a mask, one row per token.
struct MaskView {
  const uint8_t* bits = nullptr;  // null: nothing is dropped
  size_t stride = 0;
  const uint8_t* row(int32_t token) const { return bits + static_cast<size_t>(token) * stride; }
};

}  // namespace ktmoe
