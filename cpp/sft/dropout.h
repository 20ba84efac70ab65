// Dropout masks from a counter-based generator, so that a repeated pass draws the same ones.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace ktmoe {

// What identifies a mask; the reference module states how its elements are drawn (Philox4x32-10).
struct DropoutKey {
  uint64_t seed = 0;
  uint32_t step = 0;
  uint32_t layer = 0;
  uint32_t which = 0;  // 0: the input of gate and up, 1: that of down
  double rate = 0;
};

// Bytes of the bits of one token.
inline size_t mask_row_bytes(uint32_t features) { return (size_t{features} + 7) / 8; }

// Bit f of `bits` says whether feature f of a token is kept.
void draw_mask(const DropoutKey& key, uint32_t token, uint32_t features, uint8_t* bits);

// Zeroes what is dropped: values[i] belongs to feature first + i. bf16 or float.
template <class T>
void apply_mask(const uint8_t* bits, uint32_t first, uint32_t count, T* values) {
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t f = first + i;
    if (!(bits[f / 8] >> (f % 8) & 1)) values[i] = T{};
  }
}

}  // namespace ktmoe
