// The contract between the kernels of every instruction set and the layers above: formulas, layouts,
// preconditions. A kernel works on one block (some rows of one expert x some outputs), so the indirect call
// through the table is amortized.
//
// Letters: M rows of activations (tokens routed to one expert), N outputs, K summed elements.
//
// Invariance. Every product sums along K in an order that depends on K and the instruction set alone: not on
// M, not on the block a row falls into, not on the thread. So an output row has the same bits in every
// batch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/align.h"
#include "core/types.h"
#include "formats/format.h"
#include "isa/isa_id.h"
#include "kernels/activations.h"
#include "kernels/contract_elementwise.h"
#include "kernels/contract_int8.h"

namespace ktmoe::kernels {

// Outputs are cut into blocks at multiples of this, except for a matrix's last rows. Even, so that the
// K-paired layout of an intermediate never has a pair in two blocks.
inline constexpr uint32_t kOutputBlock = 32;
// The largest M that one call takes. Bounds the fp32 scratch of a worker.
inline constexpr uint32_t kMaxCallRows = 384;
// The largest N that one call takes.
inline constexpr uint32_t kMaxCallOutputs = 64;

// Rows of bf16 in row-major memory, optionally picked by an index: row m is index[m], or m without an index.
struct RowsView {
  const bf16* data = nullptr;
  size_t stride = 0;  // elements from row to row
  const int32_t* index = nullptr;
};

// Activations in the layout that the instruction set multiplies from. Made by KernelTable::pack (inputs) or
// KernelTable::activate (the intermediate); opaque to everyone but the kernels.
//   row-dot-row kernels: rows of K bf16, in place or gathered by index
//   tile kernels:        panels of 16 rows, K-paired: [K/32][16 pairs][columns][2], the last panel only as
//                        wide as its rows, K padded with zeros
// For integer products, made by KernelTable::pack_int8: codes in place of bf16, twice as many in the same
// bytes, and what became of each row.
struct QuantizedRow;
struct Operand {
  const std::byte* data = nullptr;
  size_t stride_bytes = 0;         // from row to row, or from panel to panel
  const int32_t* index = nullptr;  // of rows: null for those of tile kernels that are bf16
  uint32_t rows = 0;
  uint32_t k = 0;
  const QuantizedRow* quantized = nullptr;  // of int8 operands, by the index
  const std::byte* panels = nullptr;  // of int8 blocks: codes, scales and sums from pack_blocks, or null

  inline const QuantizedRow& quantized_row(uint32_t m) const;
};

// A row x of activations in int8: scale = max |x| / 127, codes = rint(x / scale) from -127 to 127, zeros for
// a row of zeros. A row that is not finite has a scale of NaN, and so results in NaN.
struct QuantizedRow {
  float scale;
  int32_t sum;  // of its codes
};
const QuantizedRow& Operand::quantized_row(uint32_t m) const { return quantized[index ? index[m] : m]; }

// Rows of activations in int8, in one piece of memory aligned to 64 bytes: codes, each row's on cache lines
// of its own with zeros behind them, and what became of each row.
struct Int8Rows {
  std::byte* codes = nullptr;
  size_t stride = 0;
  QuantizedRow* row = nullptr;

  static size_t stride_of(uint32_t k) { return round_up(k, kCacheLine); }
  static size_t bytes(size_t rows, uint32_t k) {
    return rows * stride_of(k) + round_up(rows * sizeof(QuantizedRow), kCacheLine);
  }
  static Int8Rows in(std::byte* data, size_t rows, uint32_t k) {
    return {data, stride_of(k), reinterpret_cast<QuantizedRow*>(data + rows * stride_of(k))};
  }
  Int8Rows from(size_t m) const { return {codes + m * stride, stride, row + m}; }
};

// C[m, n - n0] (+)= sum_k X[m, k] W[n, k] for n in [n0, n1), in fp32. C is a block of c_floats(M, n1 - n0)
// floats, in a layout that only the kernels of the same table know. With channel scales s, W[n, k] = s[n]
// V[n, k]:
//   bf16 products         C[m, n] = s[n] sum_k X[m, k] V[n, k]
//   integer products      C[m, n] = s[n] (scale[m] sum_k codes[m, k] V[n, k]), the sum, which must fit, exact
//   in int32
// which do not accumulate.
// Preconditions: n0 a multiple of kOutputBlock / 2, 1 <= M <= kMaxCallRows, n1 - n0 <= kMaxCallOutputs,
// scratch of nt_scratch_bytes(k), C aligned to 64 bytes.
struct NtArgs {
  Operand x;
  WeightView w;
  uint32_t n0 = 0, n1 = 0;
  float* c = nullptr;
  size_t c_stride = 0;  // only of tables whose c_is_rows: floats from row to row, 0 for those of a C block
  bool accumulate = false;
  std::byte* scratch = nullptr;
  // Weights that the thread probably multiplies next, to prefetch: a hint, which products of few rows take.
  const std::byte* next_rows = nullptr;
};

struct NnArgs;
struct TnArgs;
struct ActivateBackwardArgs;
struct QuantizeArgs;

enum class FloatType : uint8_t { kBf16, kFloat32 };

// What training keeps of the rows of an expert, row-major: gate and up as the activation gets them, rounded
// to `type`, and H. What is null is not kept.
struct KeptRows {
  void* gate = nullptr;
  void* up = nullptr;  // null too when the activation is not gated
  FloatType type = FloatType::kBf16;
  bf16* h = nullptr;
  size_t stride = 0;  // elements from row to row, of all three
};

// With g = C_gate + lora_scale L_gate + gate_bias, u likewise: H[m, n] = bf16(act(g, u)), the one rounding of
// the intermediate. Not gated: H = bf16(act(g)), and what belongs to up is null.
// `h` is where the operand of all rows starts; this call writes columns [n0, n1) of it, and the zero padding
// behind them when n1 is the last column. Its data is null when only `kept` is written. Biases and L are null
// for zero; biases and `kept` start at column n0.
struct ActivateArgs {
  Activation activation;
  const float* c_gate = nullptr;
  const float* c_up = nullptr;
  const float* l_gate = nullptr;  // C blocks: the outputs of the adapters
  const float* l_up = nullptr;
  float lora_scale = 0;
  const float* gate_bias = nullptr;
  const float* up_bias = nullptr;
  uint32_t n0 = 0, n1 = 0;
  Operand h;  // as given by operand_block: the rows of this call
  KeptRows kept;
};

// Y[m, n] = C[m, n] + lora_scale L[m, n] + bias[n], from C blocks to row-major fp32 or, rounded, bf16.
struct StoreRowsArgs {
  const float* c = nullptr;
  const float* l = nullptr;  // a C block or null
  float lora_scale = 0;
  const float* bias = nullptr;  // null or n values
  uint32_t m = 0, n = 0;
  void* y = nullptr;
  FloatType y_type = FloatType::kFloat32;
  size_t y_stride = 0;  // elements
};

// out[t, j] = round(base[t, j] + sum over p in slot order of weights[t, p] * y[row[t, p], j]), j < columns.
// Slots with row < 0 are skipped. A token with a non-finite hidden state and at least one slot that is not
// skipped gets NaN. `base` is null for zero; it may be `out` itself.
struct CombineArgs {
  const float* y = nullptr;
  size_t y_stride = 0;
  const int32_t* row = nullptr;    // [tokens, slots]
  const float* weights = nullptr;  // [tokens, slots]; null for ones
  uint32_t tokens = 0, slots = 0, columns = 0;
  const bf16* hidden = nullptr;  // [tokens, hidden_size], rows contiguous
  uint32_t hidden_size = 0;
  const void* base = nullptr;
  FloatType base_type = FloatType::kFloat32;
  void* out = nullptr;
  FloatType out_type = FloatType::kBf16;
  size_t out_stride = 0;  // elements, of base and out alike
};

// What one call of a limit kernel did, to be divided by its time.
struct LimitKernels {
  // Bytes read by summing [data, data + bytes); bytes a multiple of 1024.
  uint64_t (*read)(const std::byte* data, size_t bytes);
  struct Product {
    // Operations of `iterations` rounds of independent dot products, with as few loads as they need.
    double (*dot)(uint64_t iterations);
    // Those of the same products as a kernel issues them, operands loaded from the L1 cache.
    double (*step)(uint64_t iterations, std::byte* cached_32k);
  };
  Product bf16, int8;
};

// All kernels of one instruction set. No entry is null but where it says so.
struct KernelTable {
  Isa isa;

  // Bytes of an operand of m rows and k columns.
  size_t (*operand_bytes)(uint32_t m, uint32_t k);
  // Rows [m0, m1) of an operand of m rows at `data`; m0 a multiple of kOutputBlock.
  Operand (*operand_block)(std::byte* data, uint32_t m, uint32_t k, uint32_t m0, uint32_t m1);
  // The operand of rows given in row-major bf16: refers to them where the kernels read rows in place, else
  // packs them into `data`, which has operand_bytes(m, k).
  Operand (*pack)(const RowsView& rows, uint32_t m, uint32_t k, std::byte* data);

  size_t (*c_floats)(uint32_t m, uint32_t n);
  // C blocks are plain rows, so a product may be written to its final place (NtArgs::c_stride).
  bool c_is_rows;
  size_t (*nt_scratch_bytes)(uint32_t k);
  // The part of K that an NT product finishes for all its outputs before it goes on: rows of activations are
  // cut so that this much of them fits in L2. UINT32_MAX where each group of outputs takes all of K.
  uint32_t nt_block_k;
  std::array<void (*)(const NtArgs&), kNumFormats> nt;

  // Integer products: rows to int8, their operand, and the product by format, null for one that is not
  // kIsInteger.
  void (*quantize_rows)(const RowsView& rows, uint32_t m, uint32_t k, const Int8Rows& to);
  size_t (*int8_operand_bytes)(uint32_t m, uint32_t k);
  Operand (*pack_int8)(const Int8Rows& rows, const int32_t* index, uint32_t m, uint32_t k, std::byte* data);
  std::array<void (*)(const NtArgs&), kNumFormats> nt_int8;

  // Products with activations in int8 by blocks of 128 or 256, see contract_int8.h: rows to that layout, and
  // the product by format, null for one that is not an IntegerFormat. x.data is such rows, C as of `nt`;
  // products do not accumulate.
  void (*quantize_blocks)(const RowsView& rows, uint32_t m, uint32_t k, uint32_t block, std::byte* to);
  std::array<void (*)(const NtArgs&), kNumFormats> nt_int8_blocks;
  // Such rows repacked for the product: bytes of scratch, 0 where rows are used as they are, and the operand.
  // Scratch begins with a cache line and lives as long as the operand, which is for formats of this block.
  size_t (*block_panels_bytes)(uint32_t m, uint32_t k);
  Operand (*pack_blocks)(const Operand& rows, uint32_t block, std::byte* panels);

  void (*activate)(const ActivateArgs&);
  void (*store_rows)(const StoreRowsArgs&);
  void (*combine)(const CombineArgs&);
  ElementwiseKernels elementwise;

  // Training; see contract_training.h.
  size_t (*lhs_bytes)(uint32_t m, uint32_t n);
  Operand (*pack_lhs)(const RowsView& rows, uint32_t m, uint32_t n, std::byte* data);
  void (*pack_lhs_in_place)(bf16* rows, size_t stride, uint32_t m, uint32_t n, std::byte* scratch);
  Operand (*lhs_in_place)(const bf16* rows, size_t stride, uint32_t m, uint32_t n);
  size_t (*nn_scratch_bytes)();
  void (*nn)(const NnArgs&);
  size_t (*tn_scratch_bytes)();
  void (*tn)(const TnArgs&);
  void (*activate_backward)(const ActivateBackwardArgs&);

  // Quantizing; see contract_quantize.h.
  uint32_t (*quantize_int8)(const QuantizeArgs&);
  uint32_t (*quantize_int8_group)(const QuantizeArgs&);
  uint32_t (*quantize_int4)(const QuantizeArgs&);

  LimitKernels limits;
};

// The table of an instruction set that is compiled in; null for one that is not.
const KernelTable* find_table(Isa isa);

}  // namespace ktmoe::kernels
