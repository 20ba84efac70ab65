// Products of encoded weights with activations in int8: are they, to the bit, what the contract defines, on
// every instruction set, in every batch?
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "formats/registry.h"
#include "kernel_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

template <class Function>
void for_integer_formats(Function&& function) {
  for (size_t i = 0; i < kNumFormats; ++i) {
    with_format(static_cast<FormatId>(i), [&](auto f) {
      if constexpr (IntegerFormat<decltype(f)>) function(f);
    });
  }
}

// ---- weights ----

float ordinary(Random& random) {
  return std::ldexp(1 + std::fabs(random.unit()), static_cast<int>(random.below(7)) - 6);
}
void put_half(std::byte* to, Random& random) {
  // 2^-9 to 2^-2, either sign
  const uint32_t bits = (random.below(7) + 6) << 10 | random.below(1024) | random.below(2) << 15;
  const auto half = static_cast<uint16_t>(bits);
  std::memcpy(to, &half, sizeof half);
}

// Rows of random codes with scales of ordinary sizes; `extreme`: all codes bits ones or zeros.
template <class F>
class Encoded {
 public:
  Encoded(uint32_t rows, uint32_t k, uint32_t gap, Random& random, bool extreme = false)
      : k_(k),
        stride_(F::row_bytes(k) + gap),
        scale_stride_(F::scale_bytes(k) + gap),
        bytes_(rows * stride_ - gap),
        scales_(F::kScaleRows ? rows * scale_stride_ - gap : 1),
        channel_(rows) {
    for (uint32_t n = 0; n < rows; ++n) {
      channel_[n] = ordinary(random);
      fill(bytes_.data() + n * stride_, random, extreme);
      if constexpr (F::kScaleRows == 1) fill_scales(scales_.data() + n * scale_stride_, random);
    }
  }

  WeightView view() const {
    WeightView w{bytes_.data(), static_cast<ptrdiff_t>(stride_), k_};
    w.format = F::kId;
    if constexpr (F::kHasChannelScale) w.channel_scale = channel_.data();
    if constexpr (F::kScaleRows == 1) {
      w.block_scales = scales_.data(), w.block_scales_stride_bytes = static_cast<ptrdiff_t>(scale_stride_);
    }
    return w;
  }

 private:
  void fill(std::byte* row, Random& random, bool extreme) {
    const auto ones = static_cast<std::byte>(random.below(2) ? 255 : 0);
    for (size_t i = 0; i < F::row_bytes(k_); ++i)
      row[i] = extreme ? ones : static_cast<std::byte>(random.below(256));
    if constexpr (std::is_same_v<F, formats::Int8Group32>) {
      for (size_t at = k_; at < F::row_bytes(k_); at += sizeof(float)) {
        const float scale = ordinary(random);
        std::memcpy(row + at, &scale, sizeof scale);
      }
    } else if constexpr (requires { F::code_bytes(0); }) {
      for (size_t at = F::code_bytes(k_); at < F::row_bytes(k_); ++at)
        row[at] = static_cast<std::byte>(static_cast<int8_t>(static_cast<int>(random.below(31)) - 15));
    } else if constexpr (requires { F::kBlock; }) {
      for (size_t at = 0; at < F::row_bytes(k_); at += F::kBlockBytes) fill_block(row + at, random);
    }
  }
  static void fill_block(std::byte* block, Random& random) {
    if constexpr (requires { F::kScaleValues; }) {
      for (size_t g = 0; g < F::kBlock / F::kGroup; ++g)
        block[g] = static_cast<std::byte>(F::kBlock == 32 ? 118 + random.below(12) : random.below(112));
    } else if constexpr (requires { F::scale_at(block); }) {
      block[55] &= std::byte{0x1f};  // the half's upper bits, in nibbles of four words: no infinity
    } else {
      put_half(block + F::kScaleAt, random);
      if constexpr (F::kHasOffset) put_half(block + F::kOffsetAt, random);
    }
  }
  void fill_scales(std::byte* scales, Random& random) {
    for (size_t i = 0; i < F::scale_bytes(k_);) {
      if constexpr (requires { F::kScaleValues; }) {
        scales[i++] = static_cast<std::byte>(F::kGroup == 32 ? 118 + random.below(12) : random.below(112));
      } else {
        const bf16 scale = to_bf16(ordinary(random));
        std::memcpy(scales + i, &scale, sizeof scale);
        i += sizeof scale;
      }
    }
  }

  uint32_t k_;
  size_t stride_, scale_stride_;
  Guarded<std::byte> bytes_, scales_;
  Guarded<float> channel_;
};

// ---- what the contract says, value by value ----

// A row of weights as integers: factor of value i in S, and in M; scales of its group.
struct IntegerRow {
  size_t group = 0;  // values that share a scale
  std::vector<int64_t> factor, offset_factor;
  std::vector<float> scale, offset;  // by group
  float channel_scale = 1;           // applied in the end
};

template <class F>
IntegerRow integers_of(const WeightView& w, size_t n) {
  IntegerRow row;
  row.group = activation_block<F>();
  row.factor.resize(w.k), row.offset_factor.resize(w.k);
  if constexpr (requires { F::kBlock; }) {
    constexpr bool kFactors = F::kBlock == 256 && F::kGroup < 256;
    row.group = kFactors ? 256 : F::kGroup;
    for (size_t i = 0; i < w.k; ++i) {
      const std::byte* block = w.row(n) + i / F::kBlock * F::kBlockBytes;
      row.factor[i] = F::number_of(block, i % F::kBlock), row.offset_factor[i] = 1;
      const bool begins = i % row.group == 0;
      if constexpr (kFactors) {
        formats::GroupNumbers numbers;
        F::group_numbers(block, numbers);
        const size_t g = i % 256 / F::kGroup;
        row.factor[i] *= static_cast<int64_t>(formats::number_of_group(numbers.scale, g));
        row.offset_factor[i] = static_cast<int64_t>(formats::number_of_group(numbers.offset, g));
        if (begins) row.scale.push_back(F::kScaleFactor * half_to_float(F::scale_bits(block)));
        if (begins && F::kHasOffset) row.offset.push_back(-half_at(block + F::kOffsetAt));
      } else if (begins) {
        typename F::Scales scales;
        F::scales(block, scales);
        row.scale.push_back(scales.scale[i % F::kBlock / F::kGroup]);
        if (F::kHasOffset) row.offset.push_back(scales.offset[i % F::kBlock / F::kGroup]);
      }
    }
  } else if constexpr (F::kScaleRows == 1) {
    row.group = F::kGroup;
    for (size_t i = 0; i < w.k; ++i) {
      row.factor[i] = F::code(nibble_at(w.row(n), i));
      if (i % F::kGroup == 0) row.scale.push_back(F::scale(w.block_scales_of(n, 1), i));
    }
    if (F::kHasChannelScale) row.channel_scale = w.channel_scale[n];
  } else {
    if constexpr (!F::kHasChannelScale) row.group = F::kGroup;
    for (size_t i = 0; i < w.k; ++i) {
      if constexpr (F::kHasChannelScale) {
        std::vector<float> values(w.k);
        if (i == 0) {
          F::decode(w, n, values.data());
          for (size_t j = 0; j < w.k; ++j) row.factor[j] = static_cast<int64_t>(values[j]);
        }
        if (i % row.group == 0) row.scale.push_back(w.channel_scale[n]);
      } else {
        row.factor[i] = static_cast<int8_t>(w.row(n)[i]);
        if (i % row.group == 0) row.scale.push_back(F::scale(w.row(n), w.k, i));
      }
    }
  }
  return row;
}

struct QuantizedX {
  std::vector<int64_t> codes;
  std::vector<float> scales;
  QuantizedX(const std::vector<float>& x, size_t block) : codes(x.size()) {
    for (size_t at = 0; at < x.size(); at += block) {
      const size_t end = std::min(at + block, x.size());
      float most = 0;
      bool finite = true;
      for (size_t i = at; i < end; ++i) most = std::max(most, std::fabs(x[i])), finite &= std::isfinite(x[i]);
      const float scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
      scales.push_back(scale);
      if (!finite || scale == 0) continue;
      for (size_t i = at; i < end; ++i)
        codes[i] = std::clamp<int64_t>(static_cast<int64_t>(std::nearbyint(x[i] / scale)), -127, 127);
    }
  }
};

float model_product(const IntegerRow& w, const QuantizedX& x, size_t block) {
  float acc = 0;
  for (size_t at = 0, g = 0; at < x.codes.size(); at += w.group, ++g) {
    int64_t sum = 0, of_x = 0;
    for (size_t i = at; i < std::min(at + w.group, x.codes.size()); ++i)
      sum += w.factor[i] * x.codes[i], of_x += w.offset_factor[i] * x.codes[i];
    const float s = x.scales[at / block];
    acc = std::fma(w.scale[g] * s, static_cast<float>(sum), acc);
    if (!w.offset.empty()) acc = std::fma(w.offset[g] * s, static_cast<float>(of_x), acc);
  }
  return w.channel_scale * acc;
}

// ---- operands ----

struct BlocksOperand {
  Guarded<std::byte> memory, panels;
  Operand operand;
  BlocksOperand(const KernelTable& table, const RowsView& rows, uint32_t m, uint32_t k, uint32_t block)
      : memory(Guarded<std::byte>::on_cache_line(m * kernels::BlockRowLayout(k, block).stride())),
        panels(Guarded<std::byte>::on_cache_line(std::max<size_t>(table.block_panels_bytes(m, k), 1))) {
    table.quantize_blocks(rows, m, k, block, memory.data());
    operand.data = memory.data(), operand.stride_bytes = kernels::BlockRowLayout(k, block).stride();
    operand.rows = m, operand.k = k;
    operand = table.pack_blocks(operand, block, panels.data());
  }
};

std::vector<float> int8_product(const KernelTable& table, const Operand& x, const WeightView& w, uint32_t n0,
                                uint32_t n1) {
  const auto c = Guarded<float>::on_cache_line(table.c_floats(x.rows, n1 - n0));
  const auto scratch = Guarded<std::byte>::on_cache_line(table.nt_scratch_bytes(x.k));
  kernels::NtArgs args;
  args.x = x, args.w = w;
  args.n0 = n0, args.n1 = n1;
  args.c = c.data(), args.scratch = scratch.data();
  table.nt_int8_blocks[static_cast<size_t>(w.format)](args);
  const uint32_t n = n1 - n0;
  const Guarded<float> y(size_t{x.rows} * n);
  kernels::StoreRowsArgs store;
  store.c = c.data(), store.m = x.rows, store.n = n, store.y = y.data(), store.y_stride = n;
  table.store_rows(store);
  return {y.begin(), y.end()};
}

template <class F>
std::vector<uint32_t> lengths() {
  if constexpr (requires { F::kBlock; }) {
    constexpr auto b = static_cast<uint32_t>(F::kBlock);
    return {b, 2 * b, 3 * b, 9 * b};
  } else {
    return {1, 2, 15, 17, 31, 32, 33, 100, 128, 129, 160, 256, 300, 1055};
  }
}

template <class F>
void check(const KernelTable& table, uint32_t m, uint32_t n0, uint32_t n1,
           const std::vector<std::vector<float>>& x, const Encoded<F>& w) {
  const auto k = static_cast<uint32_t>(x[0].size());
  constexpr uint32_t kBlock = activation_block<F>();
  std::vector<float> flat;
  for (const auto& row : x) flat.insert(flat.end(), row.begin(), row.end());
  const Matrix matrix(m, k, Layout::kTight, [&, i = size_t{0}]() mutable { return flat[i++]; });
  const BlocksOperand operand(table, matrix.activations(), m, k, kBlock);
  const auto y = int8_product(table, operand.operand, w.view(), n0, n1);
  int wrong = 0;
  for (uint32_t n = n0; n < n1; ++n) {
    const IntegerRow row = integers_of<F>(w.view(), n);
    for (uint32_t r = 0; r < m; ++r) {
      const float expected = model_product(row, QuantizedX(matrix.row(r), kBlock), kBlock);
      const float got = y[size_t{r} * (n1 - n0) + n - n0];
      if (std::isnan(expected) ? std::isnan(got) : expected == got) continue;
      if (++wrong == 1) MESSAGE("row ", r, ", output ", n, ": got ", got, ", expected ", expected);
    }
  }
  CHECK(wrong == 0);
}

std::vector<std::vector<float>> rows_of(uint32_t m, uint32_t k, Random& random) {
  std::vector<std::vector<float>> x(m, std::vector<float>(k));
  for (auto& row : x)
    for (float& v : row) v = to_float(to_bf16(random.wide()));
  return x;
}

template <class F>
std::string text(const KernelTable& table, uint32_t m, uint32_t n, uint32_t k) {
  return std::string(isa_name(table.isa)) + ", " + std::string(F::kName) + ": M " + std::to_string(m) +
         ", N " + std::to_string(n) + ", K " + std::to_string(k);
}

}  // namespace

TEST_CASE("int8 blocks: integers lie in the range that a format names") {
  Random random(60);
  for_integer_formats([&](auto f) {
    using F = decltype(f);
    if constexpr (requires { F::kBlock; }) {
      const Encoded<F> w(64, static_cast<uint32_t>(F::kBlock), 0, random);
      int least = 1000, most = -1000;
      for (size_t n = 0; n < 64; ++n)
        for (size_t i = 0; i < F::kBlock; ++i) {
          const int number = F::number_of(w.view().row(n), i);
          least = std::min(least, number), most = std::max(most, number);
        }
      INFO(F::kName);
      CHECK(least >= F::kIntegers.least);
      CHECK(most <= F::kIntegers.most);
      CHECK((F::kIntegers.most - most) * 16 <= F::kIntegers.most - F::kIntegers.least);
    }
  });
}

TEST_CASE("int8 blocks: products are what they are defined to be, on every instruction set") {
  for (const KernelTable* table : usable_tables()) {
    Random random(61);
    for_integer_formats([&](auto f) {
      using F = decltype(f);
      CHECK((table->nt_int8_blocks[static_cast<size_t>(F::kId)] != nullptr));
      for (uint32_t k : lengths<F>()) {
        const uint32_t m = 1 + random.below(3), n = 1 + random.below(40), n0 = n > 32 ? 32 : n > 16 ? 16 : 0;
        INFO(text<F>(*table, m, n, k));
        check(*table, m, n0, n, rows_of(m, k, random), Encoded<F>(n, k, random.below(2) * 6, random));
      }
      const std::vector<uint32_t> all = lengths<F>();
      for (uint32_t m : {4u, 5u, 9u, 17u, 33u, 70u}) {
        const uint32_t n = 17 + random.below(48), k = all[random.below(static_cast<uint32_t>(all.size()))];
        INFO(text<F>(*table, m, n, k));
        check(*table, m, 0, n, rows_of(m, k, random), Encoded<F>(n, k, 0, random));
      }
      for (uint32_t n : {1u, 7u, 9u, 31u, 33u, 40u}) {
        const uint32_t n0 = n > 32 ? 32 : n > 16 ? 16 : 0, k = all[random.below(4)];
        for (uint32_t m : {5u, 18u}) {
          INFO(text<F>(*table, m, n, k));
          check(*table, m, n0, n, rows_of(m, k, random), Encoded<F>(n, k, 0, random));
        }
      }
    });
  }
}

TEST_CASE("int8 blocks: a rest of K behind whole blocks, for several panels of rows") {
  for (const KernelTable* table : usable_tables()) {
    Random random(64);
    for_integer_formats([&](auto f) {
      using F = decltype(f);
      if constexpr (!requires { F::kBlock; }) {
        for (uint32_t k : {129u, 160u, 300u}) {
          INFO(text<F>(*table, 21, 20, k));
          check(*table, 21, 0, 20, rows_of(21, k, random), Encoded<F>(20, k, 0, random));
        }
      }
    });
  }
}

TEST_CASE("int8 blocks: extremes of codes, scales and activations do not saturate") {
  for (const KernelTable* table : usable_tables()) {
    Random random(62);
    for_integer_formats([&](auto f) {
      using F = decltype(f);
      const uint32_t k = 512;
      std::vector<std::vector<float>> x(6, std::vector<float>(k));
      for (uint32_t i = 0; i < k; ++i) {
        x[0][i] = 1, x[1][i] = -1, x[2][i] = i % 2 ? 1 : -1, x[3][i] = i % 4 < 2 ? 1 : -1, x[4][i] = 0;
        x[5][i] = i % 256 == 0 ? 1 : 0x1p-133f;
      }
      INFO(text<F>(*table, 6, 24, k));
      check(*table, 6, 0, 24, x, Encoded<F>(24, k, 0, random, true));
    });
  }
}

TEST_CASE("int8 blocks: a value that is not finite makes its row NaN and no other") {
  for (const KernelTable* table : usable_tables()) {
    Random random(63);
    for_integer_formats([&](auto f) {
      using F = decltype(f);
      const uint32_t k = 512, n = 16;
      auto x = rows_of(7, k, random);
      x[1][300] = std::numeric_limits<float>::quiet_NaN();
      x[3][0] = -std::numeric_limits<float>::infinity();
      std::fill(x[4].begin(), x[4].begin() + 256, 0.0f);
      x[5].assign(k, 0.0f), x[5][511] = std::numeric_limits<float>::infinity();
      INFO(text<F>(*table, 7, n, k));
      const Encoded<F> w(n, k, 0, random);
      check(*table, 7, 0, n, x, w);
      CHECK(std::isnan(model_product(integers_of<F>(w.view(), 0), QuantizedX(x[5], activation_block<F>()),
                                     activation_block<F>())));
    });
  }
}
