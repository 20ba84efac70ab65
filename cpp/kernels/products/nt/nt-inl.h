// The NT loops of a target, for any product, and its limits, which run the same steps. Included inside a
// target's namespace.
#include "kernels/products/nt/nt_rows-inl.h"
#if KT_HAS_TILES
#include "kernels/layouts/panels-inl.h"
#include "kernels/products/nt/nt_tiles-inl.h"
#include "kernels/products/nt/nt_decoded_tile-inl.h"
#include "kernels/products/nt/nt_blocks-inl.h"
#endif
#include "kernels/limits/limits-inl.h"
#if KT_HAS_TILES
#include "kernels/limits/limits_tiles-inl.h"
#endif
