#include "kernels/table.h"

#include <cstdlib>
#include <optional>

#include "core/error.h"
#include "kernels/targets/targets.h"

namespace ktmoe::kernels {

// KTMOE_HAS_name is 1 for what the build has, else 0.
const KernelTable* find_table(Isa isa) {
#define KT_ISA(enumerator, name, platform, choice)     \
  if constexpr (KTMOE_HAS_##name) {                    \
    if (isa == Isa::enumerator) return &name::table(); \
  }
#include "isa/isas.inc"
#undef KT_ISA
  return nullptr;
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
#define KT_ISA(enumerator, name, platform, choice) \
  if (KTMOE_HAS_##name) isas.push_back(Isa::enumerator);
#include "isa/isas.inc"
#undef KT_ISA
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
