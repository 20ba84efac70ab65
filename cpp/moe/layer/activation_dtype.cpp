#include "moe/layer/activation_dtype.h"

#include "core/error.h"

namespace ktmoe {

ActivationBlocks activation_blocks(const GemmKernel& kernel, const ProjectionFormats& formats,
                                   ActivationDtype dtype) {
  if (kernel.is_integer) {
    if (dtype == ActivationDtype::kBf16)
      throw_invalid("activation_dtype: got bfloat16, expected int8: the method multiplies int8 activations; ",
                    "MOE_INT8 and MOE_INT4 take the same weights with bfloat16");
    return {};
  }
  if (dtype != ActivationDtype::kInt8) return {};
  const ActivationBlocks blocks{format_activation_block(formats.gate), format_activation_block(formats.up),
                                format_activation_block(formats.down)};
  if (!blocks.any())
    throw_invalid("activation_dtype: got int8, expected bfloat16: ", format_name(formats.gate),
                  " weights are not integers with scales");
  return blocks;
}

}  // namespace ktmoe
