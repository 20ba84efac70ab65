// The kernel table of a rows-dot-rows target. Included last inside a target's namespace.

const KernelTable& table() {
  static const KernelTable table = {
      .isa = kIsa,
      .operand_bytes = operand_bytes_rows,
      .operand_block = operand_block_rows,
      .pack = pack_rows,
      .c_floats = c_floats_rows,
      .c_is_rows = true,
      .nt_scratch_bytes = nt_scratch_bytes_rows,
      .nt =
          {
#define KT_FORMAT(id, type) nt_rows<formats::type>,
#include "formats/formats.inc"
#undef KT_FORMAT
          },
      .activate = activate_rows,
      .store_rows = store_rows_rows,
      .combine = combine_rows,
      .activate_backward = activate_backward_rows,
      .limits = {limit_read, limit_dot_rows, limit_step_rows},
  };
  return table;
}
