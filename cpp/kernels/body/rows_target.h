// The bodies of a rows-dot-rows target, in order. Included inside a target's namespace, after its policy.

#define KT_TARGET_REGION
#include "kernels/body/codes.h"
#include "formats/all.h"
#include "kernels/body/blocks.h"
#include "kernels/body/math.h"
#include "kernels/body/elements.h"
#include "kernels/body/activation.h"
#include "kernels/body/activation_backward.h"
#include "kernels/body/combine.h"
#include "kernels/body/quantize.h"
#include "kernels/body/quantize_rows.h"
#include "kernels/body/quantize_int4.h"
#include "kernels/body/nt_rows.h"
#include "kernels/body/rows.h"
#include "kernels/body/pairs.h"
#include "kernels/body/nn.h"
#include "kernels/body/nn_rows.h"
#include "kernels/body/tn.h"
#include "kernels/body/tn_rows.h"
#include "kernels/body/limits.h"
#include "kernels/body/table_rows.h"
#undef KT_TARGET_REGION
