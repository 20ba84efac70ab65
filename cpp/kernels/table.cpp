#include "kernels/table.h"

#include <cstdlib>
#include <optional>

#include "core/error.h"
#include "kernels/targets/targets.h"

namespace ktmoe::kernels {

const KernelTable* find_table(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return &scalar::table();
#if defined(KTMOE_HAS_AVX2)
    case Isa::kAvx2: return &avx2::table();
#endif
#if defined(KTMOE_HAS_AVX512)
    case Isa::kAvx512: return &avx512::table();
#endif
#if defined(KTMOE_HAS_AVX512_BF16)
    case Isa::kAvx512Bf16: return &avx512_bf16::table();
#endif
#if defined(KTMOE_HAS_AMX)
    case Isa::kAmx: return &amx::table();
#endif
#if defined(KTMOE_HAS_AMX_EMU)
    case Isa::kAmxEmu: return &amx_emu::table();
#endif
    default: return nullptr;
  }
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAllIsas)
    if (find_table(isa)) isas.push_back(isa);
  return isas;
}

namespace {

const KernelTable* choose_table() {
  const char* name = std::getenv("KTMOE_ISA");
  if (name == nullptr || *name == '\0')
    return find_table(select_isa(cpu_features(), compiled_isas(), std::nullopt));
  try {
    return find_table(select_isa(cpu_features(), compiled_isas(), name));
  } catch (const std::exception& error) {
    throw_runtime("KTMOE_ISA=", name, ": ", error.what());
  }
}

}  // namespace

const KernelTable& active_table() {
  static const KernelTable* const table = choose_table();
  return *table;
}

}  // namespace ktmoe::kernels
