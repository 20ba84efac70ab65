// The kernel families by their fixed names. "224" is the shape of a tile step: two weight tiles, two
// activation tiles, four accumulators; every family runs on every instruction set.
#pragma once

#include "formats/all.h"

namespace ktmoe {

// bf16 weights, bf16 products.
struct GemmKernel224BF {
  using Format = formats::Bf16;
  static constexpr FormatId kFormat = Format::kId;
};

}  // namespace ktmoe
