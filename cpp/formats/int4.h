// Two-level int4: w = channel_scale * m * q with q from -8 to 7 and a multiplier m from -15 to 15 for every
// group of a row, so that a row is one float32 times int8 codes m * q. A row is its q, two per byte, the
// first in the low nibble, and then its multipliers, a byte each.
#ifndef KTMOE_FORMATS_INT4_H_
#define KTMOE_FORMATS_INT4_H_

#include <cstring>

#include "core/align.h"
#include "core/types.h"
#include "formats/format.h"

namespace ktmoe::formats {

template <size_t kSize>
struct Int4 : NoBlockScales {
  static constexpr size_t kGroup = kSize;
  static constexpr FormatId kId = kSize == 32   ? FormatId::kInt4Group32
                                  : kSize == 64 ? FormatId::kInt4Group64
                                                : FormatId::kInt4Group128;
  static constexpr std::string_view kName = kSize == 32   ? "int4_group32"
                                            : kSize == 64 ? "int4_group64"
                                                          : "int4_group128";
  static constexpr bool kHasChannelScale = true, kIsInteger = true;
  static constexpr IntegerRange kIntegers{-120, 120};

  static constexpr size_t code_bytes(size_t k) { return nibble_bytes(k); }
  static constexpr size_t row_bytes(size_t k) { return code_bytes(k) + div_up(k, kGroup); }

  static int code(const std::byte* row, size_t k, size_t i) {
    const int nibble = nibble_at(row, i);
    return (nibble < 8 ? nibble : nibble - 16) * static_cast<int8_t>(row[nibble_bytes(k) + i / kGroup]);
  }
  static void decode(const WeightView& w, size_t n, float* out) {
    for (size_t i = 0; i < w.k; ++i) out[i] = static_cast<float>(code(w.row(n), w.k, i));
  }
};
using Int4Group32 = Int4<32>;
using Int4Group64 = Int4<64>;
using Int4Group128 = Int4<128>;
static_assert(WeightFormat<Int4Group32>);

}  // namespace ktmoe::formats

#endif  // KTMOE_FORMATS_INT4_H_

#ifdef KT_TARGET_REGION  // inside a target's namespace, once per target

// m q for every multiplier and nibble, as int8 and as bf16: unpacking is a lookup. Bytes are not
// checked before they are read here: an invalid multiplier gives zeros.
struct Int4Products {
  Vec::Numbers values[256] = {};  // by the multiplier's byte
  alignas(kCacheLine) int8_t codes[256][16] = {};
  constexpr Int4Products() {
    for (int m = -15; m <= 15; ++m) {
      for (int nibble = 0; nibble < 16; ++nibble) {
        const int code = m * (nibble < 8 ? nibble : nibble - 16);
        codes[m & 255][nibble] = static_cast<int8_t>(code);
        values[m & 255].set(nibble, static_cast<uint16_t>(std::bit_cast<uint32_t>(float(code)) >> 16));
      }
    }
  }
};
inline constexpr Int4Products kInt4Products;

// A segment is within one group: groups are multiples of the longest.
template <size_t kSize>
struct Unpack<formats::Int4<kSize>> {
  static constexpr bool kUsedAsStored = false, kBytesUsedAsStored = false;
  struct Row : CodeRow<Row> {
    const std::byte *data, *multipliers;
    float scale;
    Row() = default;
    KT_INLINE Row(const WeightView& w, size_t n)
        : data(w.row(n)), multipliers(data + nibble_bytes(w.k)), scale(w.channel_scale[n]) {}
    KT_INLINE size_t multiplier(size_t k) const { return static_cast<uint8_t>(multipliers[k / kSize]); }
    KT_INLINE const int8_t* products(size_t k) const { return kInt4Products.codes[multiplier(k)]; }
    KT_INLINE Vec::Segment segment(size_t k) const {
      const size_t m = multiplier(k);
      return Vec::look_up_segment(data + k / 2, kInt4Products.codes[m], kInt4Products.values[m]);
    }
    KT_INLINE Vec::Bytes bytes(size_t k) const {
      return Vec::look_up(data + k / 2, products(k), products(k + Vec::kStep));
    }
    KT_INLINE Vec::Codes codes(size_t k) const { return Vec::look_up(data + k / 2, products(k)); }
    KT_INLINE Vec::Codes codes_tail(size_t k, size_t count) const {
      std::byte full[Vec::kStep / 2] = {};
      std::memcpy(full, data + k / 2, div_up(count, 2));
      return Vec::look_up(full, products(k));
    }
  };
};

#endif  // KT_TARGET_REGION
