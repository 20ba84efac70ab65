// The instruction sets that there are kernels for, and which of them serves on a machine.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "isa/features.h"
#include "isa/isa_id.h"

namespace ktmoe {

inline constexpr Isa kAllIsas[] = {
#define KT_ISA(enumerator, name, platform, choice) Isa::enumerator,
#include "isa/isas.inc"
#undef KT_ISA
};

std::string_view isa_name(Isa isa);

// The instruction set of that name; throws std::invalid_argument listing the names.
Isa isa_from_name(std::string_view name);

bool supports(const CpuFeatures& features, Isa isa);

// Whether only an override chooses it: the emulator, for tests.
bool is_on_request(Isa isa);

// The instruction set to use: the override when given, else the most capable one that is both compiled in
// and supported. A pure function, so that tests can select for any machine.
// Throws std::invalid_argument for an unknown name, std::runtime_error for one this machine cannot run.
Isa select_isa(const CpuFeatures& features, const std::vector<Isa>& compiled,
               std::optional<std::string_view> override_name);

}  // namespace ktmoe
