// The properties of formats at run time.
#pragma once

#include <optional>

#include "formats/all.h"

namespace ktmoe {

[[noreturn]] void throw_unknown_format(FormatId id);

// Calls function(F) for the format of that id, F its type by a value. Throws std::invalid_argument for an id
// that is none.
template <class Function>
constexpr auto with_format(FormatId id, Function&& function) {
  switch (id) {
#define KT_FORMAT(id, type) \
  case FormatId::id: return function(formats::type{});
#include "formats/formats.inc"
#undef KT_FORMAT
    case FormatId::kCount: break;
  }
  throw_unknown_format(id);
}

inline size_t format_row_bytes(FormatId id, size_t k) {
  return with_format(id, [&](auto f) { return decltype(f)::row_bytes(k); });
}
inline bool format_has_channel_scale(FormatId id) {
  return with_format(id, [](auto f) { return decltype(f)::kHasChannelScale; });
}
inline size_t format_scale_bytes(FormatId id, size_t k) {
  return with_format(id, [&](auto f) { return decltype(f)::scale_bytes(k); });
}
inline uint32_t format_scale_rows(FormatId id) {
  return with_format(id, [](auto f) { return uint32_t{decltype(f)::kScaleRows}; });
}
// Values that a row's length is a multiple of.
inline size_t format_block(FormatId id) {
  return with_format(id, [](auto f) -> size_t {
    if constexpr (requires { decltype(f)::kBlock; }) return decltype(f)::kBlock;
    return 1;
  });
}
// Values that a row can be cut at multiples of: no scale or block then serves both sides.
inline size_t format_unit(FormatId id) {
  return with_format(id, [](auto f) -> size_t {
    if constexpr (requires { decltype(f)::kBlock; }) return decltype(f)::kBlock;
    if constexpr (requires { decltype(f)::kGroup; }) return decltype(f)::kGroup;
    return 1;
  });
}
// Bytes of the codes of a row; the scales of its groups follow.
inline size_t format_code_bytes(FormatId id, size_t k) {
  return with_format(id, [&](auto f) {
    if constexpr (requires { decltype(f)::code_bytes(k); }) return decltype(f)::code_bytes(k);
    return decltype(f)::row_bytes(k);
  });
}
inline bool format_is_blocks(FormatId id) {
  return with_format(id, [](auto f) { return requires { decltype(f)::kBlock; }; });
}
// Activations that share a scale in products with int8 activations; 0 for formats that have none.
inline uint32_t format_activation_block(FormatId id) {
  return with_format(id, [](auto f) -> uint32_t {
    if constexpr (IntegerFormat<decltype(f)>) return activation_block<decltype(f)>();
    return 0;
  });
}
inline std::string_view format_name(FormatId id) {
  return with_format(id, [](auto f) { return decltype(f)::kName; });
}

inline bool format_is_integer(FormatId id) {
  return with_format(id, [](auto f) { return decltype(f)::kIsInteger; });
}
// Values of a row that share a scale; none: there are no scales, or one for all of a row.
inline std::optional<size_t> format_group(FormatId id) {
  return with_format(id, [](auto f) -> std::optional<size_t> {
    if constexpr (requires { decltype(f)::kGroup; }) return decltype(f)::kGroup;
    return std::nullopt;
  });
}
// The number of a tensor type in GGUF files.
inline std::optional<int> format_gguf_type(FormatId id) {
  return with_format(id, [](auto f) -> std::optional<int> {
    if constexpr (requires { decltype(f)::kGgufType; }) return decltype(f)::kGgufType;
    return std::nullopt;
  });
}

}  // namespace ktmoe
