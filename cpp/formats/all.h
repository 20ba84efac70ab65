// Every format's header. Included plainly it brings their types; inside a target region (KT_TARGET_REGION) it
// brings their Unpack specializations, once per target, so it has no include guard. A format that is added is
// named here and in formats.inc.

#include "formats/bf16.h"
#include "formats/fp8.h"
#include "formats/gguf_32.h"
#include "formats/gguf_floats.h"
#include "formats/gguf_fp4.h"
#include "formats/gguf_iq.h"
#include "formats/gguf_k.h"
#include "formats/gguf_ternary.h"
#include "formats/int4.h"
#include "formats/int4_zp.h"
#include "formats/int8.h"
#include "formats/mxfp4.h"
#include "formats/nvfp4.h"
#include "formats/rawint4.h"
