// What the tests of quantizing share: rows of weights as they may lie in memory, and what becomes of them.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernel_helpers.h"
#include "kernels/contract_quantize.h"
#include "moe/weights/quantize.h"

namespace ktmoe::test {

using kernels::FloatType;
using kernels::QuantizeArgs;

inline bool is_int4(FormatId format) { return format != FormatId::kInt8 && format != FormatId::kInt8Group32; }

inline uint32_t group_size(FormatId format) {
  return static_cast<uint32_t>(format_group(format).value_or(QuantizeArgs{}.group));
}

using Rows = std::vector<std::vector<float>>;

// Rows of floats of either type; what is between the rows is NaN.
class Weights {
 public:
  Weights(const Rows& rows, FloatType type, Layout layout)
      : type_(type),
        n_(static_cast<uint32_t>(rows.size())),
        k_(static_cast<uint32_t>(rows[0].size())),
        stride_(layout == Layout::kApart ? 2 * size_t{k_} + 3 : k_),
        bytes_(((n_ - 1) * stride_ + k_) * item_bytes() + (layout == Layout::kOdd ? 1 : 0)) {
    for (uint32_t n = 0; n < n_; ++n)
      for (uint32_t i = 0; i < k_; ++i) set(n, i, rows[n][i]);
  }

  void set(uint32_t n, uint32_t i, float value) {
    const bf16 rounded = to_bf16(value);
    std::byte* at = bytes_.data() + (n * stride_ + i) * item_bytes();
    std::memcpy(at, type_ == FloatType::kBf16 ? static_cast<const void*>(&rounded) : &value, item_bytes());
  }

  QuantizeArgs args() const {
    QuantizeArgs a;
    a.rows = bytes_.data(), a.type = type_, a.stride = static_cast<ptrdiff_t>(stride_);
    a.n = n_, a.k = k_;
    return a;
  }

 private:
  size_t item_bytes() const { return type_ == FloatType::kBf16 ? sizeof(bf16) : sizeof(float); }

  FloatType type_;
  uint32_t n_, k_;
  size_t stride_;
  Guarded<std::byte> bytes_;
};

// Room for the result of a call, `gap` bytes between the rows of codes. All of it starts as 0xff.
class Quantized {
 public:
  Quantized(FormatId format, QuantizeArgs args, size_t gap = 0)
      : format_(format),
        args_(args),
        row_bytes_(format_row_bytes(format, args.k)),
        codes_(args.n ? (args.n - 1) * (row_bytes_ + gap) + row_bytes_ : 0),
        channel_scale_(args.n) {
    args_.group = group_size(format);
    args_.codes = codes_.data(), args_.codes_stride = row_bytes_ + gap;
    args_.channel_scale = format_has_channel_scale(format) ? channel_scale_.data() : nullptr;
  }

  const QuantizeArgs& args() const { return args_; }

  // By the kernel of a table; the first row that is not finite.
  uint32_t run(const KernelTable& table) { return quantizer(table, format_)(args_); }

  // The bytes of row n, its scale behind them.
  std::string row(uint32_t n) const {
    std::string bytes(reinterpret_cast<const char*>(args_.codes + n * args_.codes_stride), row_bytes_);
    return bytes.append(reinterpret_cast<const char*>(&channel_scale_[n]), sizeof(float));
  }
  std::string untouched_row() const { return std::string(row_bytes_ + sizeof(float), '\xff'); }

  float channel_scale(uint32_t n) const { return channel_scale_[n]; }
  int code(uint32_t n, uint32_t i) const {
    const std::byte* codes = args_.codes + n * args_.codes_stride;
    if (!is_int4(format_)) return static_cast<int8_t>(codes[i]);
    const int pair = static_cast<int>(codes[i / 2]), q = i % 2 ? pair >> 4 : pair & 15;
    const auto* m = reinterpret_cast<const int8_t*>(codes + (args_.k + 1) / 2);
    return ((q ^ 8) - 8) * m[i / args_.group];
  }
  float decoded(uint32_t n, uint32_t i) const {
    float scale = channel_scale_[n];
    if (!format_has_channel_scale(format_))
      std::memcpy(&scale, args_.codes + n * args_.codes_stride + args_.k + i / 32 * sizeof scale,
                  sizeof scale);
    return static_cast<float>(code(n, i)) * scale;
  }
  // The bytes between the rows are as they were.
  bool gaps_are_untouched() const {
    for (size_t i = 0; i < codes_.size(); ++i)
      if (i % args_.codes_stride >= row_bytes_ && codes_[i] != std::byte{0xff}) return false;
    return true;
  }

 private:
  FormatId format_;
  QuantizeArgs args_;
  size_t row_bytes_;
  Guarded<std::byte> codes_;
  Guarded<float> channel_scale_;
};

}  // namespace ktmoe::test
