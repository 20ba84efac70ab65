// The kernel table of a tile target. Included last inside a target's namespace.

template <class Format>
constexpr auto integer_product() -> void (*)(const NtArgs&) {
  if constexpr (Format::kIsInteger) {
    return nt_tiles<Format, TileInt8>;
  } else {
    return nullptr;
  }
}

const KernelTable& table() {
  static const KernelTable table = {
      .isa = kIsa,
      .operand_bytes = operand_bytes_tiles,
      .operand_block = operand_block_tiles,
      .pack = pack_tiles,
      .c_floats = c_floats_tiles,
      .c_is_rows = false,
      .nt_scratch_bytes = nt_scratch_bytes_tiles,
      .nt =
          {
#define KT_FORMAT(id, type) nt_tiles<formats::type, TileBf16>,
#include "formats/formats.inc"
#undef KT_FORMAT
          },
      .quantize_rows = quantize_rows,
      .int8_operand_bytes = int8_operand_bytes_tiles,
      .pack_int8 = pack_int8_tiles,
      .nt_int8 =
          {
#define KT_FORMAT(id, type) integer_product<formats::type>(),
#include "formats/formats.inc"
#undef KT_FORMAT
          },
      .activate = activate_tiles,
      .store_rows = store_rows_tiles,
      .combine = combine_rows,
      .left_bytes = left_bytes_tiles,
      .pack_left = pack_left_tiles,
      .pack_left_in_rows = pack_left_in_rows_tiles,
      .left_in_rows = left_in_rows_tiles,
      .nn_scratch_bytes = nn_scratch_bytes_tiles,
      .nn =
          {
#define KT_FORMAT(id, type) nn_tiles<LoopFormat<formats::type>>,
#include "formats/formats.inc"
#undef KT_FORMAT
          },
      .tn_scratch_bytes = tn_scratch_bytes_tiles,
      .tn = tn_tiles,
      .activate_backward = activate_backward_rows,
      .quantize_int8 = quantize_int8_rows,
      .quantize_int8_group = quantize_int8_group_rows,
      .quantize_int4 = quantize_int4_rows,
      .limits = {limit_read,
                 {limit_dot_tiles<TileBf16>, limit_step_tiles<TileBf16>},
                 {limit_dot_tiles<TileInt8>, limit_step_tiles<TileInt8>}},
  };
  return table;
}
