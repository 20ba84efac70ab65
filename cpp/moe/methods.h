// The methods: the weight formats of a layer, how its weights are loaded, and its product.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>

#include "formats/format.h"

namespace ktmoe {

// How a layer loads its weights.
enum class WeightSource : uint8_t {
  kNative,     // as the checkpoint has them
  kQuantized,  // quantized when they are loaded, or long before
  kGguf,       // blocks of GGUF, each projection in a format of its own
};

// What the main products multiply.
enum class ProductType : uint8_t { kBf16, kInt8 };

struct Method {
  static constexpr size_t kMaxFormats = 4;

  const char* name;
  const char* inference_class;
  const char* training_class;
  WeightSource weights;
  ProductType product;
  std::string_view family;
  std::string_view codes, scales;  // dtypes with a space between them
  const char* inference_text;
  const char* training_text;
  std::array<FormatId, kMaxFormats> format_ids;
  size_t num_formats;

  constexpr std::span<const FormatId> formats() const { return {format_ids.data(), num_formats}; }
};

namespace detail {
constexpr auto make_methods() {
  using enum FormatId;
  return std::to_array<Method>({
#define KT_METHOD(name, stem, weights, product, family, codes, scales, text, ...) \
  {name,                                                                          \
   stem "_MOE",                                                                   \
   stem "_SFT_MOE",                                                               \
   WeightSource::weights,                                                         \
   ProductType::product,                                                          \
   family,                                                                        \
   codes,                                                                         \
   scales,                                                                        \
   text,                                                                          \
   "Experts as those of " stem "_MOE, and adapters that train.",                  \
   {__VA_ARGS__},                                                                 \
   std::initializer_list<FormatId>{__VA_ARGS__}.size()},
#include "moe/methods.inc"
#undef KT_METHOD
  });
}
}  // namespace detail

inline constexpr auto kMethods = detail::make_methods();

// Throws std::invalid_argument for a name that no method has.
const Method& find_method(std::string_view name);

}  // namespace ktmoe
