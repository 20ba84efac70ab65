// The kernel families by their fixed names: a weight format, and what products it enters. "224" is the shape
// of a tile step: two weight tiles, two activation tiles, four accumulators; every family runs on every
// instruction set.
#pragma once

#include "formats/all.h"

namespace ktmoe {

// Products of bf16: weights are decoded on the way, whole numbers exactly.
template <class F>
struct Bf16Family {
  using Format = F;
  static constexpr FormatId kFormat = F::kId;
  static constexpr bool kIsInteger = false;
};

// Products of int8: activations are quantised, row by row.
template <class F>
struct IntegerFamily {
  static_assert(F::kIsInteger);
  using Format = F;
  static constexpr FormatId kFormat = F::kId;
  static constexpr bool kIsInteger = true;
};

using GemmKernel224BF = Bf16Family<formats::Bf16>;
using GemmKernel224Int8 = IntegerFamily<formats::Int8>;
using GemmKernel224Int4 = IntegerFamily<formats::Int4Group32>;

}  // namespace ktmoe
