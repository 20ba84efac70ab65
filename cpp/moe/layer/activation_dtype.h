// Whether the products of a layer with encoded weights take activations in bf16 or int8.
#pragma once

#include <cstdint>

#include "formats/registry.h"
#include "moe/layer/gemm_kernel.h"
#include "moe/weights/expert_slices.h"

namespace ktmoe {

// Activations that share a scale in each projection's int8 block products (kernels/contract_int8.h); 0
// for those of another kind.
struct ActivationBlocks {
  uint32_t gate = 0, up = 0, down = 0;

  bool any() const { return gate != 0 || up != 0 || down != 0; }
  // Whether gate or up takes the inputs in such blocks.
  bool takes(uint32_t block) const { return gate == block || up == block; }
};

// The blocks of a layer with these weight formats. Throws std::invalid_argument for int8 when no projection
// supports it, and for bf16 when the method's activations are int8 with a scale per row.
ActivationBlocks activation_blocks(const GemmKernel& kernel, const ProjectionFormats& formats,
                                   ActivationDtype dtype);

}  // namespace ktmoe
