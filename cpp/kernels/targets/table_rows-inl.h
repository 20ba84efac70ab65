// The kernel table of a rows-dot-rows target. Included last inside a target's namespace.

template <class Format>
constexpr auto integer_product() -> void (*)(const NtArgs&) {
  if constexpr (Format::kIsInteger) {
    return nt_rows<Format, Int8Product>;
  } else {
    return nullptr;
  }
}

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
#define KT_FORMAT(id, type) nt_rows<LoopFormat<formats::type>, Bf16Product>,
#include "formats/formats.inc"
#undef KT_FORMAT
          },
      .quantize_rows = quantize_rows,
      .int8_operand_bytes = int8_operand_bytes_rows,
      .pack_int8 = pack_int8_rows,
      .nt_int8 =
          {
#define KT_FORMAT(id, type) integer_product<formats::type>(),
#include "formats/formats.inc"
#undef KT_FORMAT
          },
      .activate = activate_rows,
      .store_rows = store_rows_rows,
      .combine = combine_rows,
      .left_bytes = left_bytes_rows,
      .pack_left = pack_left_rows,
      .pack_left_in_rows = pack_left_in_rows_rows,
      .left_in_rows = left_in_rows_rows,
      .nn_scratch_bytes = nn_scratch_bytes_rows,
      .nn =
          {
#define KT_FORMAT(id, type) nn_rows<LoopFormat<formats::type>>,
#include "formats/formats.inc"
#undef KT_FORMAT
          },
      .tn_scratch_bytes = tn_scratch_bytes_rows,
      .tn = tn_rows,
      .activate_backward = activate_backward_rows,
      .quantize_int8 = quantize_int8_rows,
      .quantize_int8_group = quantize_int8_group_rows,
      .quantize_int4 = quantize_int4_rows,
      .limits = {limit_read,
                 {limit_dot_rows<Bf16Product>, limit_step_rows<Bf16Product>},
                 {limit_dot_rows<Int8Product>, limit_step_rows<Int8Product>}},
  };
  return table;
}
