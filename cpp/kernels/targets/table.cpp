// The table of an instruction set, and how formats are decoded by a pointer. Compiled once per instruction
// set.
#include "kernels/targets/begin_target.h"
#ifndef KT_TARGET_BASE
#include "kernels/unpack/functions-inl.h"

const UnpackFunction kUnpackFunctions[kNumFormats] = {
#define KT_FORMAT(id, type) unpack_function<formats::type>(),
#include "formats/formats.inc"
#undef KT_FORMAT
};

const DecodeFunction kDecodeFunctions[kNumFormats] = {
#define KT_FORMAT(id, type) DecodeColumns<formats::type>::run,
#include "formats/formats.inc"
#undef KT_FORMAT
};
#endif

KT_END_TARGET

const KernelTable& table() {
  static const KernelTable table = [] {
#ifdef KT_TARGET_BASE
    KernelTable table = KT_TARGET_BASE::table();
#else
    KernelTable table{};
    add_nt(table);
    add_nn_tn(table);
    add_elementwise(table);
    add_quantize(table);
#endif
    table.isa = KT_TARGET_ISA;
    add_nt_int8(table);
    add_nt_int8_blocks(table);
    return table;
  }();
  return table;
}

}  // namespace ktmoe::kernels::KT_TARGET_NAME
