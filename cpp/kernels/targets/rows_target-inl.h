// The bodies of a rows-dot-rows target, in order. Included inside a target's namespace, after its policy.

#define KT_TARGET_REGION
#include "kernels/unpack/codes-inl.h"
#include "formats/all.h"
#include "kernels/unpack/blocks-inl.h"
#include "kernels/elementwise/math-inl.h"
#include "kernels/elementwise/elements-inl.h"
#include "kernels/elementwise/activation-inl.h"
#include "kernels/elementwise/activation_backward-inl.h"
#include "kernels/elementwise/combine-inl.h"
#include "kernels/quantize/quantize-inl.h"
#include "kernels/quantize/quantize_rows-inl.h"
#include "kernels/quantize/quantize_int4-inl.h"
#include "kernels/products/nt/nt_rows-inl.h"
#include "kernels/layouts/rows-inl.h"
#include "kernels/layouts/pairs-inl.h"
#include "kernels/products/nn/nn-inl.h"
#include "kernels/products/nn/nn_rows-inl.h"
#include "kernels/products/tn/tn-inl.h"
#include "kernels/products/tn/tn_rows-inl.h"
#include "kernels/limits/limits-inl.h"
#include "kernels/targets/table_rows-inl.h"
#undef KT_TARGET_REGION
