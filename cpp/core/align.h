// Sizes in whole cache lines and the like.
#pragma once

#include <cstddef>

namespace ktmoe {

inline constexpr size_t kCacheLine = 64;

constexpr size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr size_t div_up(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace ktmoe
