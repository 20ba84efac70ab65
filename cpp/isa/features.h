// What this processor can do and the operating system lets it do, asked once.
#pragma once

namespace ktmoe {

struct CpuFeatures {
  bool avx2 = false;         // with fma and f16c, and YMM state enabled by the system
  bool avx512 = false;       // f, bw, vl, dq, vnni, and ZMM state enabled
  bool avx512_bf16 = false;  // bf16, vbmi and vbmi2
  bool amx = false;          // tile, int8, bf16, and the kernel has granted this process the tile state
};

// The features of the machine this runs on. The first call asks the kernel for permission to use AMX tiles.
const CpuFeatures& cpu_features();

}  // namespace ktmoe
