#include "sft/dropout.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace ktmoe {
namespace {

// Philox4x32-10 of Salmon, Moraes, Dror and Shaw (2011).
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53u} * c[0], right = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(right >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(right),
         static_cast<uint32_t>(left >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(left)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace

void draw_mask(const DropoutKey& key, uint32_t token, uint32_t features, uint8_t* bits) {
  const auto threshold = static_cast<uint32_t>(key.rate * 0x1p32);
  std::memset(bits, 0, mask_row_bytes(features));
  for (uint32_t f = 0; f < features; f += 4) {
    const auto words = philox({f / 4, token, key.step, 2 * key.layer + key.which},
                              static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
    for (uint32_t i = 0; i < std::min(features - f, 4u); ++i)
      bits[(f + i) / 8] |= static_cast<uint8_t>((words[i] >= threshold) << ((f + i) % 8));
  }
}

}  // namespace ktmoe
