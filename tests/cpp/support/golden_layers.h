// Layers with weights that are the same numbers on every platform, and digests of what they compute.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "format_encodings.h"
#include "formats/registry.h"
#include "kernel_helpers.h"
#include "moe/layer/tp_moe.h"
#include "sft/tp_moe_sft.h"

namespace ktmoe::test {

// FNV-1a over the bytes of arrays.
class Digest {
 public:
  template <class T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) state_ = (state_ ^ bytes[i]) * 0x100000001b3;
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0xcbf29ce484222325;
};

// A projection's matrices in a format: any codes, and scales that keep weights small.
class GoldenMatrices {
 public:
  GoldenMatrices(FormatId format, size_t experts, size_t rows, size_t k, Random& random)
      : format_(format), rows_(rows), k_(k), row_bytes_(format_row_bytes(format, k)) {
    codes_.resize(experts * rows * row_bytes_);
    if (format_is_blocks(format)) {
      in_block_ = scales_in_block(format);
    } else {
      code_ = code_encoding(format), row_scale_ = row_scale_encoding(format);
    }
    for (size_t n = 0; n < experts * rows; ++n) draw_row(codes_.data() + n * row_bytes_, random);
    if (format_has_channel_scale(format)) {
      const float size = format_scale_rows(format) ? 0x1p-6f : 0x1p-10f;  // of scaled codes: of bare ones
      for (size_t n = 0; n < experts * rows; ++n)
        channel_scale_.push_back(size * (1.5f + 0.5f * random.unit()));
    }
    if (const uint32_t serves = format_scale_rows(format)) {
      scale_rows_ = div_up(rows, serves), scale_bytes_ = format_scale_bytes(format, k);
      scales_.resize(experts * scale_rows_ * scale_bytes_);
      draw_scales(scales_, block_scale_encoding(format), 0x1p-4f, random);
    }
  }

  std::vector<WeightView> views() const {
    std::vector<WeightView> all;
    for (size_t e = 0; e < codes_.size() / (rows_ * row_bytes_); ++e) {
      WeightView view{codes_.data() + e * rows_ * row_bytes_, static_cast<ptrdiff_t>(row_bytes_),
                      static_cast<uint32_t>(k_)};
      view.format = format_;
      if (!channel_scale_.empty()) view.channel_scale = channel_scale_.data() + e * rows_;
      if (!scales_.empty()) {
        view.block_scales = scales_.data() + e * scale_rows_ * scale_bytes_;
        view.block_scales_stride_bytes = static_cast<ptrdiff_t>(scale_bytes_);
      }
      all.push_back(view);
    }
    return all;
  }

 private:
  template <class T>
  static void put(std::byte* at, const T& value) {
    std::memcpy(at, &value, sizeof value);
  }

  void draw_row(std::byte* row, Random& random) {
    for (size_t i = 0; i < row_bytes_; ++i) row[i] = static_cast<std::byte>(random.below(256));
    if (format_is_blocks(format_)) {
      const size_t block_bytes = format_row_bytes(format_, format_block(format_));
      for (size_t at = 0; at < row_bytes_; at += block_bytes)
        for (const ScaleInBlock& scale : in_block_)
          draw_scale_in_block(row + at + scale.at, scale.encoding, random);
    } else {
      draw_codes(row, random);
      const size_t codes = format_code_bytes(format_, k_);
      draw_scales({row + codes, row + row_bytes_}, row_scale_, 0x1p-10f, random);
    }
  }

  // Draws codes of whole bytes again, so that they are finite and small; smaller codes are, whatever their
  // bits.
  void draw_codes(std::byte* row, Random& random) {
    for (size_t i = 0; i < k_ && code_; ++i) {
      switch (*code_) {
        case Encoding::kBf16: put(row + 2 * i, to_bf16(random.unit() * 0.125f)); break;
        case Encoding::kInt8:
          put(row + i, static_cast<int8_t>(static_cast<int>(random.below(255)) - 127));
          break;
        case Encoding::kE4m3: row[i] &= std::byte{0xbf}; break;  // below 2, and no NaN
        default: FAIL("codes of this encoding are not drawn");
      }
    }
  }

  // Sizes between 2^-14 and 2^-3.
  static void draw_scale_in_block(std::byte* at, Encoding encoding, Random& random) {
    const auto masked = [&](uint32_t mask, uint32_t set) {
      return static_cast<std::byte>((random.bits() & mask) | set);
    };
    switch (encoding) {
      case Encoding::kFloat16: at[1] = masked(0x9f, 0x04); break;
      case Encoding::kSpreadFloat16: at[7] = masked(0x90, 0x10), at[5] &= std::byte{0x0f}; break;
      case Encoding::kFloat32: at[3] = masked(0x81, 0x3c); break;
      case Encoding::kE8m0: *at = static_cast<std::byte>(115 + random.below(8)); break;
      case Encoding::kE4m3: *at = static_cast<std::byte>(8 + random.below(24)); break;
      default: FAIL("scales of this encoding in a block are not drawn");
    }
  }

  // Scales one after the other, floats from `size` to twice that.
  static void draw_scales(std::span<std::byte> scales, std::optional<Encoding> encoding, float size,
                          Random& random) {
    const auto fill = [&](auto next) {
      for (size_t at = 0; at + sizeof(next()) <= scales.size(); at += sizeof(next()))
        put(scales.data() + at, next());
    };
    if (!encoding) return;
    switch (*encoding) {
      case Encoding::kFloat32: return fill([&] { return size * (1.5f + 0.5f * random.unit()); });
      // Codes with such scales are integers up to 8.
      case Encoding::kBf16: return fill([&] { return to_bf16(size / 8 * (1.5f + 0.5f * random.unit())); });
      case Encoding::kE8m0: return fill([&] { return static_cast<uint8_t>(121 + random.below(5)); });
      case Encoding::kE4m3: return fill([&] { return static_cast<uint8_t>(0x30 + random.below(24)); });
      case Encoding::kInt8:
        return fill([&] {
          const int multiplier = 1 + static_cast<int>(random.below(15));
          return static_cast<int8_t>(random.below(2) ? multiplier : -multiplier);
        });
      default: FAIL("scales of this encoding are not drawn");
    }
  }

  FormatId format_;
  size_t rows_, k_, row_bytes_, scale_rows_ = 0, scale_bytes_ = 0;
  std::optional<Encoding> code_, row_scale_;
  std::vector<ScaleInBlock> in_block_;
  std::vector<std::byte> codes_, scales_;
  std::vector<float> channel_scale_;
};

struct GoldenCase {
  std::string name;
  GemmKernel kernel;
  FormatId format;
  kernels::Activation activation = {};
  int64_t hidden = 96, intermediate = 70;
};

// A layer of five experts, two for each token, a batch, and what a training step gives.
class GoldenLayer {
 public:
  static constexpr int64_t kExperts = 5, kSlots = 2, kRank = 3;

  explicit GoldenLayer(const GoldenCase& c) : layer_(config_of(c), c.kernel), hidden_(size(c.hidden)) {
    const size_t width = size(c.intermediate), experts = size(kExperts);
    gate_ = std::make_unique<GoldenMatrices>(c.format, experts, width, hidden_, random_);
    up_ = std::make_unique<GoldenMatrices>(c.format, experts, width, hidden_, random_);
    down_ = std::make_unique<GoldenMatrices>(c.format, experts, hidden_, width, random_);
    ExpertWeights weights;
    weights.matrices = {gate_->views(), up_->views(), down_->views()};
    if (!c.activation.gated) weights.matrices.up.clear();
    weights.biases.gate = floats(experts * width, 0.1f),
    weights.biases.down = floats(experts * hidden_, 0.1f);
    layer_.load_weights(weights);
    LoraSources sources;
    for (size_t i = 0; i < kNumLora; ++i) {
      lora_.push_back(floats(experts * lora_size(i), 0.2f));
      if (lora_size(i) != 0) sources[i] = {lora_.back().data(), kernels::FloatType::kFloat32};
    }
    layer_.update_lora_weights(sources);
  }

  uint64_t forward(uint32_t num_tokens) {
    const Batch batch(*this, num_tokens);
    std::vector<float> out(num_tokens * hidden_);
    ForwardArgs args = batch.args(out.data());
    args.out_type = kernels::FloatType::kFloat32;
    layer_.forward(args);
    REQUIRE(std::ranges::all_of(out, is_finite));
    Digest digest;
    digest.add(out);
    return digest.value();
  }

  uint64_t step(uint32_t num_tokens) {
    const Batch batch(*this, num_tokens);
    std::vector<bf16> out(num_tokens * hidden_), grad_input(num_tokens * hidden_);
    std::vector<float> grad_weights(num_tokens * size(kSlots));
    layer_.forward_sft(batch.args(out.data()), true);
    BackwardArgs args;
    args.num_tokens = num_tokens, args.grad_output = batch.grad_output.data();
    args.grad_input = grad_input.data(), args.grad_weights = grad_weights.data();
    std::vector<std::vector<float>> grads;
    for (size_t i = 0; i < kNumLora; ++i) {
      grads.emplace_back(size(kExperts) * lora_size(i));
      if (lora_size(i) != 0) args.lora[i] = grads.back().data();
    }
    std::vector<float> grad_down(size(kExperts) * hidden_ * size(layer_.config().intermediate_size));
    args.down_proj = grad_down.data();
    layer_.backward(args);
    REQUIRE(std::ranges::all_of(grad_down, is_finite));
    REQUIRE(std::ranges::all_of(grad_input, is_finite, to_float));
    Digest digest;
    digest.add(out), digest.add(grad_input), digest.add(grad_weights), digest.add(grad_down);
    for (const auto& grad : grads) digest.add(grad);
    return digest.value();
  }

 private:
  struct Batch {
    std::vector<bf16> x, grad_output;
    std::vector<int64_t> ids;
    std::vector<float> weights;
    uint32_t num_tokens;

    Batch(GoldenLayer& layer, uint32_t num) : num_tokens(num) {
      Random random(num);
      for (size_t i = 0; i < num * layer.hidden_; ++i) x.push_back(to_bf16(random.unit()));
      for (size_t i = 0; i < num * layer.hidden_; ++i) grad_output.push_back(to_bf16(random.unit()));
      for (size_t i = 0; i < num * size(kSlots); ++i) {
        ids.push_back(static_cast<int64_t>(random.below(kExperts + 1)) - 1);
        weights.push_back(random.unit());
      }
    }
    ForwardArgs args(void* out) const {
      ForwardArgs args;
      args.num_tokens = num_tokens, args.hidden_states = x.data();
      args.topk_ids = ids.data(), args.topk_weights = weights.data(), args.out = out;
      return args;
    }
  };

  static bool is_finite(float value) { return std::isfinite(value); }
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  size_t lora_size(size_t i) const { return lora_shape(layer_.sft_config(), static_cast<LoraId>(i)).size(); }
  std::vector<float> floats(size_t count, float largest) {
    std::vector<float> drawn(count);
    for (float& value : drawn) value = largest * random_.unit();
    return drawn;
  }

  static MOESFTConfig config_of(const GoldenCase& c) {
    MOESFTConfig config;
    config.expert_num = kExperts, config.num_experts_per_tok = kSlots;
    config.hidden_size = c.hidden, config.intermediate_size = c.intermediate;
    config.activation = c.activation;
    config.pool = std::make_shared<WorkerPool>(WorkerPoolConfig{1, {0}, {2}}, Topology::read());
    config.lora_rank = kRank, config.lora_alpha = 5.0, config.lora_dropout = 0.25;
    return config;
  }

  TP_MOE_SFT layer_;
  size_t hidden_;
  Random random_{1};
  std::unique_ptr<GoldenMatrices> gate_, up_, down_;
  std::vector<std::vector<float>> lora_;
};

}  // namespace ktmoe::test
