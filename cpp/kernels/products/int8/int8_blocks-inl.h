// Products of encoded weights with activations in int8, of any number of rows. Included inside a target's
// namespace, after panels-inl.h of a target with tiles.
#include "kernels/unpack/integers-inl.h"
#include "kernels/products/int8/rows-inl.h"
#if KT_HAS_256_BITS
#include "kernels/products/int8/few_rows-inl.h"
#endif
#include "kernels/products/int8/panels-inl.h"
#if KT_HAS_TILES
#include "kernels/products/int8/panel_blocks-inl.h"
#include "kernels/products/int8/weight_tiles-inl.h"
#include "kernels/products/int8/tiles-inl.h"
#endif

#if KT_HAS_256_BITS
// Decoded in registers.
template <class Format>
inline constexpr bool kIsDecodedInPlace = !BlockFormat<Format> || HasUnpack<Format>;
#endif

template <class Format>
void nt_int8_blocks(const NtArgs& args) {
#if KT_HAS_TILES
  if (args.x.panels != nullptr) return int8_tiles<Format>(args);
#endif
#if KT_HAS_256_BITS
  if constexpr (kIsDecodedInPlace<Format>) {
    if (args.x.rows == 1) return int8_few_rows<Format, 1>(args, 0);
    if (args.x.rows == 2) return int8_few_rows<Format, 2>(args, 0);
    if (args.x.rows <= kInPlaceUpTo<Format>) {
      for (uint32_t m = 0; m < args.x.rows; m += kFewRows) int8_few_rows<Format, kFewRows>(args, m);
      return;
    }
  }
#endif
  int8_panels<Format>(args);
}
