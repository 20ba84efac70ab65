// The NT products of encoded weights with activations in int8 of an instruction set. Compiled once per
// instruction set.
#include "kernels/targets/begin_target.h"
#if KT_HAS_TILES
#include "kernels/layouts/panels-inl.h"
#endif
#include "kernels/products/nt/nt_rows-inl.h"
#include "kernels/products/int8/int8_blocks-inl.h"

template <class Format>
constexpr void (*nt_int8_blocks_or_null())(const NtArgs&) {
  if constexpr (IntegerFormat<Format>) {
    return nt_int8_blocks<Format>;
  } else {
    return nullptr;
  }
}

#if !KT_HAS_TILES
// Rows are multiplied as they are.
inline size_t block_panels_bytes(uint32_t, uint32_t) { return 0; }
inline Operand pack_blocks(const Operand& rows, uint32_t, std::byte*) { return rows; }
#endif

KT_END_TARGET

void add_nt_int8_blocks(KernelTable& table) {
  table.nt_int8_blocks = {
#define KT_FORMAT(id, type) nt_int8_blocks_or_null<formats::type>(),
#include "formats/formats.inc"
#undef KT_FORMAT
  };
  table.block_panels_bytes = block_panels_bytes;
  table.pack_blocks = pack_blocks;
}

}  // namespace ktmoe::kernels::KT_TARGET_NAME
