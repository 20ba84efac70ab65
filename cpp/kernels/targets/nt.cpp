// The bf16 NT products of an instruction set, and how fast it reads. Compiled once per instruction set.
#include "kernels/targets/begin_target.h"
#include "kernels/products/nt/nt-inl.h"

#if KT_HAS_TILES
// Blocks that are decoded in registers have loops of their own where rows are few.
template <class Format>
using TileFormat = std::conditional_t<BlockFormat<Format> && HasUnpack<Format>, Format, LoopFormat<Format>>;
template <class Format>
inline constexpr auto kNt = nt_tiles<TileFormat<Format>, TileBf16>;
#else
template <class Format>
inline constexpr auto kNt = nt_rows<LoopFormat<Format>, Bf16Product>;
#endif

KT_END_TARGET

void add_nt(KernelTable& table) {
  table.nt = {
#define KT_FORMAT(id, type) kNt<formats::type>,
#include "formats/formats.inc"
#undef KT_FORMAT
  };
  table.limits.read = limit_read;
#if KT_HAS_TILES
  table.c_floats = c_floats_tiles, table.c_is_rows = false;
  table.nt_scratch_bytes = nt_scratch_bytes_tiles;
  table.nt_block_k = kTileBlockSteps * TileBf16::kStep;
  table.limits.bf16 = {limit_dot_tiles<TileBf16>, limit_step_tiles<TileBf16>};
#else
  table.c_floats = c_floats_rows, table.c_is_rows = true;
  table.nt_scratch_bytes = nt_scratch_bytes_rows;
  table.nt_block_k = UINT32_MAX;
  table.limits.bf16 = {limit_dot_rows<Bf16Product>, limit_step_rows<Bf16Product>};
#endif
}

}  // namespace ktmoe::kernels::KT_TARGET_NAME
