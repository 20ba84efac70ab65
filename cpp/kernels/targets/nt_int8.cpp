// The int8 NT products of an instruction set. Compiled once per instruction set.
#include "kernels/targets/begin_target.h"
#include "kernels/products/nt/nt-inl.h"

#if KT_HAS_TILES
template <class Format>
inline constexpr auto kNtInt8 = nt_tiles<Format, TileInt8>;
#else
template <class Format>
inline constexpr auto kNtInt8 = nt_rows<Format, Int8Product>;
#endif

template <class Format>
constexpr void (*nt_int8())(const NtArgs&) {
  if constexpr (Format::kIsInteger) {
    return kNtInt8<Format>;
  } else {
    return nullptr;
  }
}

KT_END_TARGET

void add_nt_int8(KernelTable& table) {
  table.nt_int8 = {
#define KT_FORMAT(id, type) nt_int8<formats::type>(),
#include "formats/formats.inc"
#undef KT_FORMAT
  };
#if KT_HAS_TILES
  table.limits.int8 = {limit_dot_tiles<TileInt8>, limit_step_tiles<TileInt8>};
#else
  table.limits.int8 = {limit_dot_rows<Int8Product>, limit_step_rows<Int8Product>};
#endif
}

}  // namespace ktmoe::kernels::KT_TARGET_NAME
