// Integers of either size, as callers have them.
#pragma once

#include <cstdint>
#include <variant>

namespace ktmoe {

using Integers = std::variant<const int64_t*, const int32_t*>;

}  // namespace ktmoe
