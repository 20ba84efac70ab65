#include "isa/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace ktmoe {
namespace {

#if defined(__x86_64__)

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return Leaf{};
  return r;
}

constexpr bool has(uint32_t reg, int bit) { return (reg >> bit) & 1u; }

// The register states that the operating system saves, or 0 without XSAVE.
uint64_t enabled_states() {
  constexpr int kOsxsave = 27;
  if (!has(cpuid(1, 0).c, kOsxsave)) return 0;
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// A process must request AMX tile state: without the permission the first tile instruction faults.
bool request_tile_permission() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
  const uint64_t states = enabled_states();
  const Leaf l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = cpuid(7, 1);
  const bool ymm = (states & kYmmState) == kYmmState, zmm = (states & kZmmState) == kZmmState;

  CpuFeatures f;
  f.avx2 = ymm && has(l1.c, 12) /*fma*/ && has(l1.c, 29) /*f16c*/ && has(l7.b, 5);
  f.avx_vnni = f.avx2 && has(l71.a, 4);
  f.avx512 = f.avx2 && zmm && has(l7.b, 16) /*f*/ && has(l7.b, 17) /*dq*/ && has(l7.b, 30) /*bw*/ &&
             has(l7.b, 31) /*vl*/ && has(l7.c, 11) /*vnni*/;
  f.avx512_bf16 = f.avx512 && has(l71.a, 5) && has(l7.c, 1) /*vbmi*/ && has(l7.c, 6) /*vbmi2*/;
  f.amx = f.avx512_bf16 && (states & kTileState) == kTileState && has(l7.d, 22) /*bf16*/ &&
          has(l7.d, 24) /*tile*/ && has(l7.d, 25) /*int8*/ && request_tile_permission();
  return f;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace ktmoe
