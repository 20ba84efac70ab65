// The bodies of a tile target, in order. Included inside a target's namespace, after its policies.

#define KT_TARGET_REGION
#include "formats/all.h"
#include "kernels/body/math.h"
#include "kernels/body/elements.h"
#include "kernels/body/activation.h"
#include "kernels/body/activation_backward.h"
#include "kernels/body/combine.h"
#include "kernels/body/quantize.h"
#include "kernels/body/quantize_int4.h"
#include "kernels/body/nt_tiles.h"
#include "kernels/body/tiles.h"
#include "kernels/body/pairs.h"
#include "kernels/body/nn.h"
#include "kernels/body/nn_few_rows.h"
#include "kernels/body/nn_tiles.h"
#include "kernels/body/tn.h"
#include "kernels/body/tn_tiles.h"
#include "kernels/body/limits.h"
#include "kernels/body/limits_tiles.h"
#include "kernels/body/table_tiles.h"
#undef KT_TARGET_REGION
