// What an instruction set does elementwise, and the layouts of its operands. Compiled once per instruction
// set.
#include "kernels/targets/begin_target.h"
#include "kernels/elementwise/activation-inl.h"
#include "kernels/elementwise/activation_backward-inl.h"
#include "kernels/elementwise/combine-inl.h"
#include "kernels/elementwise/rows-inl.h"
#if KT_HAS_TILES
#include "kernels/layouts/panels-inl.h"
#include "kernels/layouts/tiles-inl.h"
#else
#include "kernels/products/nt/nt_rows-inl.h"
#include "kernels/layouts/rows-inl.h"
#endif

KT_END_TARGET

void add_elementwise(KernelTable& table) {
  table.operand_bytes = operand_bytes;
  table.operand_block = operand_block;
  table.pack = pack;
  table.int8_operand_bytes = int8_operand_bytes;
  table.pack_int8 = pack_int8;
  table.activate = activate;
  table.store_rows = store_rows;
  table.combine = combine;
  table.activate_backward = activate_backward;
  table.elementwise = kElementwise;
}

}  // namespace ktmoe::kernels::KT_TARGET_NAME
