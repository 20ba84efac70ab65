#include "isa/isa.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace ktmoe {
namespace {

std::string names(const std::vector<Isa>& isas) {
  std::string list;
  for (Isa isa : isas) list += (list.empty() ? "" : ", ") + std::string(isa_name(isa));
  return list;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmx: return "amx";
    case Isa::kAmxEmu: return "amx_emu";
  }
  return "unknown";
}

Isa isa_from_name(std::string_view name) {
  for (Isa isa : kAllIsas)
    if (isa_name(isa) == name) return isa;
  throw_invalid("isa: unknown instruction set '", name, "', expected one of ",
                names({std::begin(kAllIsas), std::end(kAllIsas)}));
}

bool supports(const CpuFeatures& features, Isa isa) {
  switch (isa) {
    case Isa::kScalar:
    case Isa::kAmxEmu: return true;
    case Isa::kAvx2: return features.avx2;
    case Isa::kAvx512: return features.avx512;
    case Isa::kAvx512Bf16: return features.avx512_bf16;
    case Isa::kAmx: return features.amx;
  }
  return false;
}

Isa select_isa(const CpuFeatures& features, const std::vector<Isa>& compiled,
               std::optional<std::string_view> override_name) {
  std::vector<Isa> usable;
  for (Isa isa : compiled)
    if (supports(features, isa)) usable.push_back(isa);

  if (override_name) {
    const Isa wanted = isa_from_name(*override_name);
    if (std::find(usable.begin(), usable.end(), wanted) != usable.end()) return wanted;
    throw_runtime("isa: '", *override_name, "' cannot run on this machine, which has ", names(usable));
  }
  Isa best = Isa::kScalar;
  for (Isa isa : usable)
    if (isa != Isa::kAmxEmu) best = std::max(best, isa);
  return best;
}

}  // namespace ktmoe
