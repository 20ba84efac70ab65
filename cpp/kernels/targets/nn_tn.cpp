// The NN and TN products of an instruction set: training. Compiled once per instruction set.
#include "kernels/targets/begin_target.h"
#include "kernels/layouts/pairs-inl.h"
#include "kernels/products/nn/nn-inl.h"
#if KT_HAS_TILES
#include "kernels/layouts/panels-inl.h"
#include "kernels/products/nn/nn_few_rows-inl.h"
#include "kernels/products/nn/nn_tiles-inl.h"
#else
#include "kernels/products/nn/nn_rows-inl.h"
#endif
#include "kernels/products/tn/tn-inl.h"
#if KT_HAS_TILES
#include "kernels/products/tn/tn_tiles-inl.h"
#else
#include "kernels/products/tn/tn_rows-inl.h"
#endif

KT_END_TARGET

void add_nn_tn(KernelTable& table) {
  table.lhs_bytes = lhs_bytes;
  table.pack_lhs = pack_lhs;
  table.pack_lhs_in_place = pack_lhs_in_place;
  table.lhs_in_place = lhs_in_place;
  table.nn_scratch_bytes = nn_scratch_bytes;
  table.nn = nn;
  table.tn_scratch_bytes = tn_scratch_bytes;
  table.tn = tn;
}

}  // namespace ktmoe::kernels::KT_TARGET_NAME
