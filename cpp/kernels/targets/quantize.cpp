// How an instruction set quantizes weights and activations. Compiled once per instruction set.
#include "kernels/targets/begin_target.h"
#include "kernels/quantize/quantize-inl.h"
#include "kernels/quantize/quantize_rows-inl.h"
#include "kernels/quantize/quantize_int4-inl.h"

KT_END_TARGET

void add_quantize(KernelTable& table) {
  table.quantize_rows = quantize_rows;
  table.quantize_blocks = quantize_blocks;
  table.quantize_int8 = quantize_int8;
  table.quantize_int8_group = quantize_int8_group;
  table.quantize_int4 = quantize_int4;
}

}  // namespace ktmoe::kernels::KT_TARGET_NAME
