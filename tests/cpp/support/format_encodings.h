// How the codes and scales of a format are encoded, and where its blocks have their scales: found by decoding
// rows, so that tests that draw weights need no list of formats.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/registry.h"

namespace ktmoe::test {

enum class Encoding {
  kFloat32,
  kBf16,
  kE8m0,
  kE4m3,
  kInt8,
  kFloat16,
  kSpreadFloat16,  // in the upper nibbles of bytes 1, 3, 5 and 7, the lowest first
};

// One row of a single group or block, whose bytes stand for small positive numbers until they are set. The
// channel scale is left out, as in all decoding.
class ProbedRow {
 public:
  explicit ProbedRow(FormatId format, std::byte byte = std::byte{0x11})
      : row(format_row_bytes(format, format_unit(format)), byte),
        scales(format_scale_bytes(format, format_unit(format)), byte),
        format_(format) {}

  std::vector<float> weights() const {
    WeightView view{row.data(), static_cast<ptrdiff_t>(row.size()),
                    static_cast<uint32_t>(format_unit(format_))};
    view.format = format_;
    view.block_scales = scales.data(), view.block_scales_stride_bytes = static_cast<ptrdiff_t>(scales.size());
    std::vector<float> values(view.k);
    with_format(format_, [&](auto f) { decltype(f)::decode(view, 0, values.data()); });
    return values;
  }

  std::vector<std::byte> row, scales;

 private:
  FormatId format_;
};

// The encoding of the number in these bytes of a row or of its scales: the one whose 2 doubles a weight that
// its 1 gives.
inline std::optional<Encoding> encoding_of(const ProbedRow& probed, std::span<std::byte> number) {
  struct Pattern {
    Encoding encoding;
    size_t bytes;
    uint32_t one, two;
  };
  // A small integer may be taken for a power of two, not the other way round, so int8 is the last.
  constexpr Pattern kPatterns[] = {{Encoding::kFloat32, 4, 0x3f800000, 0x40000000},
                                   {Encoding::kBf16, 2, 0x3f80, 0x4000},
                                   {Encoding::kE8m0, 1, 127, 128},
                                   {Encoding::kE4m3, 1, 0x38, 0x40},
                                   {Encoding::kInt8, 1, 1, 2}};
  const std::vector<std::byte> before(number.begin(), number.end());
  const auto weights_with = [&](uint32_t bits) {
    std::memcpy(number.data(), &bits, number.size());
    return probed.weights();
  };
  std::optional<Encoding> found;
  for (const Pattern& pattern : kPatterns) {
    if (found || pattern.bytes != number.size()) continue;
    const std::vector<float> once = weights_with(pattern.one), twice = weights_with(pattern.two);
    for (size_t i = 0; i < once.size(); ++i)
      if (std::isnormal(once[i]) && twice[i] == 2 * once[i]) found = pattern.encoding;
  }
  std::ranges::copy(before, number.begin());
  return found;
}

inline Encoding required(std::optional<Encoding> found, FormatId format, const char* what) {
  INFO(std::string(format_name(format)));
  REQUIRE_MESSAGE(found.has_value(), what, ": encoded as no number that tests can draw");
  return *found;
}

// The encoding of codes of whole bytes; none for smaller ones, any of which will do.
inline std::optional<Encoding> code_encoding(FormatId format) {
  ProbedRow probed(format);
  const size_t values = 2 * format_unit(format), bytes = format_code_bytes(format, values) / values;
  if (bytes == 0) return std::nullopt;
  return required(encoding_of(probed, std::span(probed.row).first(bytes)), format, "codes");
}

// The encoding of the scales behind the codes of a row; none if there are none.
inline std::optional<Encoding> row_scale_encoding(FormatId format) {
  ProbedRow probed(format);
  const size_t codes = format_code_bytes(format, format_unit(format));
  if (probed.row.size() == codes) return std::nullopt;
  return required(encoding_of(probed, std::span(probed.row).subspan(codes)), format, "scales of groups");
}

// The encoding of separate block scales; none if there are none.
inline std::optional<Encoding> block_scale_encoding(FormatId format) {
  ProbedRow probed(format);
  if (probed.scales.empty()) return std::nullopt;
  return required(encoding_of(probed, probed.scales), format, "block scales");
}

// A scale or an offset within a block.
struct ScaleInBlock {
  size_t at;
  Encoding encoding;
};

// Those of a format of blocks, in the order of their bytes. A block of zeros with an infinite scale has
// weights that are not finite; encodings without infinity are found by their 1 and 2.
inline std::vector<ScaleInBlock> scales_in_block(FormatId format) {
  struct Infinity {
    Encoding encoding;
    std::vector<uint8_t> bytes;
  };
  static const Infinity kInfinities[] = {{Encoding::kFloat16, {0, 0x7c}},
                                         {Encoding::kSpreadFloat16, {0, 0, 0, 0, 0, 0xc0, 0, 0x70}},
                                         {Encoding::kFloat32, {0, 0, 0x80, 0x7f}}};
  std::vector<ScaleInBlock> found;
  const size_t block_bytes = ProbedRow(format).row.size();
  for (const Infinity& infinity : kInfinities) {
    for (size_t at = 0; at + infinity.bytes.size() <= block_bytes; ++at) {
      ProbedRow probed(format, std::byte{0});
      std::memcpy(probed.row.data() + at, infinity.bytes.data(), infinity.bytes.size());
      const auto is_finite = [](float weight) { return std::isfinite(weight); };
      if (!std::ranges::all_of(probed.weights(), is_finite)) found.push_back({at, infinity.encoding});
    }
    if (!found.empty()) return found;
  }
  ProbedRow probed(format);
  for (size_t at = 0; at < block_bytes; ++at) {
    const std::optional<Encoding> encoding = encoding_of(probed, std::span(probed.row).subspan(at, 1));
    if (encoding == Encoding::kE8m0 || encoding == Encoding::kE4m3) found.push_back({at, *encoding});
  }
  INFO(std::string(format_name(format)));
  REQUIRE_MESSAGE(!found.empty(), "scales of a block: encoded as no number that tests can draw");
  return found;
}

}  // namespace ktmoe::test
