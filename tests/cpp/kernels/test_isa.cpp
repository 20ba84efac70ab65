// Which instruction set serves on which machine? Asked about machines that are not this one.
#include <doctest/doctest.h>

#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "formats/registry.h"
#include "isa/isa.h"
#include "kernels/table.h"
#include "runtime_helpers.h"

using namespace ktmoe;
using ktmoe::test::message_of;

namespace {

const std::vector<Isa> kAll(std::begin(kAllIsas), std::end(kAllIsas));
constexpr CpuFeatures kSkylake{.avx2 = true, .avx512 = true, .avx512_bf16 = false, .amx = false};
constexpr CpuFeatures kHaswell{.avx2 = true, .avx512 = false, .avx512_bf16 = false, .amx = false};
constexpr CpuFeatures kAlderLake{.avx2 = true, .avx_vnni = true};
constexpr CpuFeatures kEverything{
    .avx2 = true, .avx_vnni = true, .avx512 = true, .avx512_bf16 = true, .amx = true};

std::string selected(const CpuFeatures& features, const std::vector<Isa>& compiled,
                     std::optional<std::string_view> name = {}) {
  return std::string(isa_name(select_isa(features, compiled, name)));
}

// The instruction sets that a processor may have or not.
constexpr bool CpuFeatures::* kOptional[] = {&CpuFeatures::avx2, &CpuFeatures::avx_vnni, &CpuFeatures::avx512,
                                             &CpuFeatures::avx512_bf16, &CpuFeatures::amx};
constexpr unsigned kNumProcessors = 1u << std::size(kOptional);

CpuFeatures features_of(unsigned bits) {
  CpuFeatures features;
  for (size_t i = 0; i < std::size(kOptional); ++i) features.*kOptional[i] = (bits >> i & 1) != 0;
  return features;
}

// Every choice of instruction sets that a build may have; always with scalar.
std::vector<std::vector<Isa>> builds() {
  std::vector<std::vector<Isa>> all;
  const size_t others = kAll.size() - 1;
  for (unsigned bits = 0; bits < 1u << others; ++bits) {
    std::vector<Isa> compiled{Isa::kScalar};
    for (size_t i = 0; i < others; ++i)
      if (bits >> i & 1) compiled.push_back(kAll[i + 1]);
    all.push_back(compiled);
  }
  return all;
}

}  // namespace

TEST_CASE("isa: names and values stand for each other") {
  for (Isa isa : kAllIsas) CHECK(isa_from_name(isa_name(isa)) == isa);
  CHECK(isa_name(Isa::kAvx512Bf16) == "avx512_bf16");
}

TEST_CASE("isa: the emulator alone is used on request only") {
  for (Isa isa : kAllIsas) CHECK(is_on_request(isa) == (isa == Isa::kAmxEmu));
}

TEST_CASE("isa: machines get the best that they have") {
  CHECK(selected({}, kAll) == "scalar");
  CHECK(selected(kHaswell, kAll) == "avx2");
  CHECK(selected(kAlderLake, kAll) == "avx_vnni");
  CHECK(selected(kSkylake, kAll) == "avx512");
  CHECK(selected({.avx2 = true, .avx512 = true, .avx512_bf16 = true, .amx = false}, kAll) == "avx512_bf16");
  CHECK(selected(kEverything, kAll) == "amx");
  CHECK(selected(kEverything, {Isa::kScalar, Isa::kAvx2, Isa::kAmxEmu}) == "avx2");
  CHECK(selected(kEverything, {Isa::kScalar, Isa::kAmxEmu}) == "scalar");
}

TEST_CASE("isa: the choice is the highest that is both compiled and supported, in every combination") {
  for (unsigned bits = 0; bits < kNumProcessors; ++bits) {
    const CpuFeatures features = features_of(bits);
    for (const auto& compiled : builds()) {
      Isa best = Isa::kScalar;
      for (Isa isa : compiled)
        if (!is_on_request(isa) && supports(features, isa) && isa > best) best = isa;
      CHECK(select_isa(features, compiled, {}) == best);
    }
  }
}

TEST_CASE("isa: an override is obeyed where it can be, in every combination") {
  for (unsigned bits = 0; bits < kNumProcessors; ++bits) {
    const CpuFeatures features = features_of(bits);
    for (const auto& compiled : builds()) {
      for (Isa isa : kAllIsas) {
        const bool usable =
            std::find(compiled.begin(), compiled.end(), isa) != compiled.end() && supports(features, isa);
        if (usable) {
          CHECK(select_isa(features, compiled, isa_name(isa)) == isa);
        } else {
          CHECK_THROWS_AS(select_isa(features, compiled, isa_name(isa)), std::runtime_error);
        }
      }
    }
  }
}

TEST_CASE("isa: an unknown name is an error that lists the names") {
  const std::string expected =
      "isa: got 'avx1024', expected one of scalar, avx2, avx_vnni, avx512, "
      "avx512_bf16, amx, amx_emu";
  CHECK(message_of<std::invalid_argument>([] { select_isa(kEverything, kAll, "avx1024"); }) == expected);
  CHECK(message_of<std::invalid_argument>([] { isa_from_name("avx1024"); }) == expected);
  for (const char* name : {"", "AVX2", "avx2 ", "avx"})
    CHECK_THROWS_AS(isa_from_name(name), std::invalid_argument);
}

TEST_CASE("isa: a name that the machine or the build lacks is an error that says what there is") {
  CHECK(message_of<std::runtime_error>([] { select_isa(kSkylake, kAll, "amx"); }) ==
        "isa: got 'amx', expected one that can run on this machine: scalar, avx2, avx512, amx_emu");
  CHECK(message_of<std::runtime_error>([] { select_isa(kEverything, {Isa::kScalar}, "amx_emu"); }) ==
        "isa: got 'amx_emu', expected one that can run on this machine: scalar");
}

TEST_CASE("isa: this machine's features form a chain, and its tables are what they say") {
  const CpuFeatures& f = cpu_features();
  CHECK((f.avx2 || !f.avx512));
  CHECK((f.avx2 || !f.avx_vnni));
  CHECK((f.avx512 || !f.avx512_bf16));
  CHECK((f.avx512_bf16 || !f.amx));
  for (Isa isa : kernels::compiled_isas()) CHECK(kernels::find_table(isa)->isa == isa);
}

TEST_CASE("isa: every entry of every table is there") {
  for (Isa isa : kernels::compiled_isas()) {
    const kernels::KernelTable& t = *kernels::find_table(isa);
    CAPTURE(isa_name(isa).data());
    CHECK(t.isa == isa);
    for (size_t id = 0; id < kNumFormats; ++id) {
      CHECK((t.nt[id] != nullptr));
      CHECK((t.nt_int8[id] != nullptr) == format_is_integer(static_cast<FormatId>(id)));
    }
    CHECK((t.operand_bytes && t.operand_block && t.pack && t.c_floats && t.nt_scratch_bytes));
    CHECK(t.nt_block_k > 0);
    CHECK((t.quantize_rows && t.int8_operand_bytes && t.pack_int8));
    CHECK((t.activate && t.store_rows && t.combine && t.activate_backward));
    CHECK((t.lhs_bytes && t.pack_lhs && t.pack_lhs_in_place && t.lhs_in_place));
    CHECK((t.nn_scratch_bytes && t.nn && t.tn_scratch_bytes && t.tn));
    CHECK((t.quantize_int8 && t.quantize_int8_group && t.quantize_int4));
    const kernels::ElementwiseKernels& e = t.elementwise;
    CHECK((e.copy_finite && e.scale && e.scale_finite && e.round_scaled && e.round && e.add));
    CHECK((e.dot && e.dot_blocks && e.sum && e.draw_mask && e.mask_bf16 && e.mask_float));
    CHECK((t.limits.read && t.limits.bf16.dot && t.limits.bf16.step && t.limits.int8.dot &&
           t.limits.int8.step));
  }
}

TEST_CASE("isa: the process uses the set that KTMOE_ISA names, else the best") {
  const char* name = std::getenv("KTMOE_ISA");
  const bool forced = name != nullptr && *name != '\0';
  const std::string expected = forced ? name : selected(cpu_features(), kernels::compiled_isas());
  CHECK(isa_name(kernels::active_table().isa) == expected);
}
