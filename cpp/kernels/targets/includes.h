// Everything a target needs from outside its region: headers included inside one would be compiled for its
// instruction set and, being inline, could replace everyone's copy at link time.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/align.h"
#include "core/types.h"
#include "formats/all.h"
#include "formats/registry.h"
#include "kernels/contract.h"
#include "kernels/contract_quantize.h"
#include "kernels/contract_training.h"
#include "kernels/policy/vec.h"
#include "kernels/targets/targets.h"
