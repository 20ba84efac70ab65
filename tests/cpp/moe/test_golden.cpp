// Bits that must not change by accident: digests of outputs and gradients, kept from version to version.
//
// KTMOE_GOLDEN_RECORD=FILE appends the digests of the active instruction set as lines for golden.inc.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>

#include "core/error.h"
#include "golden_layers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

// Of forward passes of 1, 5 and 75 tokens, and of a training step.
using Digests = std::array<uint64_t, 4>;

const std::map<std::string, Digests>& kept_digests() {
  static const std::map<std::string, Digests> kept = {
#define GOLDEN(isa, name, ...) {isa ": " name, {__VA_ARGS__}},
#include "golden.inc"
#undef GOLDEN
  };
  return kept;
}

// The emulator of the tile unit has the tile unit's products, but its own vectors: other bits of activations.
// AVX-VNNI changes integer sums alone, which are exact.
std::string isa_of_bits() {
  const Isa isa = kernels::active_table().isa;
  return std::string(isa_name(isa == Isa::kAvxVnni ? Isa::kAvx2 : isa));
}

std::vector<GoldenCase> all_cases() {
  std::vector<GoldenCase> cases;
  for (size_t i = 0; i < kNumFormats; ++i) {
    const auto format = static_cast<FormatId>(i);
    const auto block = static_cast<int64_t>(format_block(format));
    const auto is_namesake = [&](const GoldenCase& other) { return other.name == format_name(format); };
    const bool is_named_twice = std::ranges::any_of(cases, is_namesake);
    GoldenCase c{str_cat(is_named_twice ? "gguf_" : "", format_name(format)), {format, false}, format};
    if (block > 1) c.hidden = block == 32 ? 96 : 256, c.intermediate = block == 32 ? 64 : 512;
    cases.push_back(c);
    if (format_is_integer(format)) {
      c.name += " integer", c.kernel.is_integer = true;
      cases.push_back(c);
    }
  }
  for (const kernels::ActivationInfo& info : kernels::kActivations) {
    kernels::Activation activation = kernels::default_activation(info.kind, info.has_gated());
    activation.limit = 0.5f;
    const int number = static_cast<int>(info.kind);
    cases.push_back({"bf16 activation " + std::to_string(number), GemmKernel224BF, FormatId::kBf16,
                     activation, 200, 130});
  }
  return cases;
}

void record(const char* file, const std::string& name, const Digests& digests) {
  std::ofstream to(file, std::ios::app);
  to << "GOLDEN(\"" << isa_of_bits() << "\", \"" << name << "\"" << std::hex;
  for (uint64_t digest : digests) to << ", 0x" << digest;
  to << ")\n";
}

}  // namespace

TEST_CASE("golden: outputs and gradients have the bits they had") {
  const char* file = std::getenv("KTMOE_GOLDEN_RECORD");
  size_t num_checked = 0;
  for (const GoldenCase& c : all_cases()) {
    const std::string name = isa_of_bits() + ": " + c.name;
    INFO(name);
    GoldenLayer layer(c);
    const Digests digests{layer.forward(1), layer.forward(5), layer.forward(75), layer.step(40)};
    if (file != nullptr) {
      record(file, c.name, digests);
      continue;
    }
    const auto found = kept_digests().find(name);
    if (found == kept_digests().end()) {
      MESSAGE("no digests are kept of ", name);  // a new case, until they are recorded on this machine
      continue;
    }
    CHECK(found->second == digests);
    ++num_checked;
  }
  if (file != nullptr) return;
  const auto is_active = [](const auto& kept) { return kept.first.starts_with(isa_of_bits() + ": "); };
  CHECK(num_checked == static_cast<size_t>(std::ranges::count_if(kept_digests(), is_active)));
}
