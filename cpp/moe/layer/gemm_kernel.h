// The product of a layer: a weight format, and the kind of product. "224" is the shape of a tile step:
// two weight tiles, two activation tiles, four accumulators. Every kernel runs on every instruction set.
#pragma once

#include <algorithm>
#include <optional>

#include "kernels/contract.h"
#include "kernels/contract_training.h"
#include "moe/layer/config.h"
#include "moe/methods.h"

namespace ktmoe {

struct GemmKernel {
  // None: each projection has a format of its own, a block format or bf16.
  std::optional<FormatId> format;
  // True: int8 products, activations are quantized row by row. False: bf16 products of decoded weights.
  bool is_integer;

  // Bytes of an operand of m rows and k columns.
  size_t operand_bytes(const kernels::KernelTable& table, uint32_t m, uint32_t k) const {
    return (is_integer ? table.int8_operand_bytes : table.operand_bytes)(m, k);
  }
  void multiply(const kernels::KernelTable& table, const kernels::NtArgs& args) const {
    (is_integer ? table.nt_int8 : table.nt)[static_cast<size_t>(args.w.format)](args);
  }
};

inline constexpr GemmKernel GemmKernel224BF{FormatId::kBf16, false};
inline constexpr GemmKernel GemmKernel224Int8{FormatId::kInt8, true};
inline constexpr GemmKernel GemmKernel224Int4{FormatId::kInt4Group32, true};

// What a method multiplies with. Throws std::invalid_argument for a group size that the method does not
// support, and for rows so long that int32 sums could overflow.
GemmKernel gemm_kernel(const Method& method, const GeneralMOEConfig& config);

}  // namespace ktmoe
