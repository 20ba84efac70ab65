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

enum class Choice { automatic, on_request };

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
#define KT_ISA(enumerator, name, platform, choice) \
  case Isa::enumerator: return #name;
#include "isa/isas.inc"
#undef KT_ISA
  }
  return "unknown";
}

Isa isa_from_name(std::string_view name) {
  for (Isa isa : kAllIsas)
    if (isa_name(isa) == name) return isa;
  throw_invalid("isa: got '", name, "', expected one of ", names({std::begin(kAllIsas), std::end(kAllIsas)}));
}

bool supports(const CpuFeatures& f, Isa isa) {
  switch (isa) {
#define KT_ISA(enumerator, name, platform, choice) \
  case Isa::enumerator: return f.name;
#include "isa/isas.inc"
#undef KT_ISA
  }
  return false;
}

bool is_on_request(Isa isa) {
  switch (isa) {
#define KT_ISA(enumerator, name, platform, choice) \
  case Isa::enumerator: return Choice::choice == Choice::on_request;
#include "isa/isas.inc"
#undef KT_ISA
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
    throw_runtime("isa: got '", *override_name,
                  "', expected one that can run on this machine: ", names(usable));
  }
  Isa best = Isa::kScalar;
  for (Isa isa : usable)
    if (!is_on_request(isa)) best = std::max(best, isa);
  return best;
}

}  // namespace ktmoe
