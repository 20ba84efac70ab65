#include "moe/methods.h"

#include <algorithm>

#include "core/error.h"

namespace ktmoe {

const Method& find_method(std::string_view name) {
  const auto* found = std::ranges::find(kMethods, name, &Method::name);
  if (found == kMethods.end()) throw_invalid("method: got '", name, "', expected one of the registry's");
  return *found;
}

}  // namespace ktmoe
