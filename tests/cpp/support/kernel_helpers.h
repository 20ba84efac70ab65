// What the tests of the kernels share: the tables to test, matrices as they may lie in memory, products.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "formats/all.h"
#include "guarded.h"
#include "kernels/table.h"

namespace ktmoe::test {

using kernels::KernelTable;
using kernels::Operand;
using kernels::RowsView;

// Every table that is compiled in and that this machine can run; those on request, which are emulators, not
// where KTMOE_TEST_WITHOUT_EMULATOR is set: on an emulated machine they take most of the time.
inline std::vector<const KernelTable*> usable_tables() {
  static const bool without_emulator = std::getenv("KTMOE_TEST_WITHOUT_EMULATOR") != nullptr;
  std::vector<const KernelTable*> tables;
  for (Isa isa : kernels::compiled_isas()) {
    if (is_on_request(isa) && without_emulator) continue;
    if (supports(cpu_features(), isa)) tables.push_back(kernels::find_table(isa));
  }
  return tables;
}

// Numbers that are the same on every platform, which the distributions of <random> are not.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  uint32_t bits() { return engine_(); }
  uint32_t below(uint32_t limit) { return engine_() % limit; }
  // In [-1, 1).
  float unit() { return static_cast<float>(static_cast<int32_t>(engine_())) * 0x1p-31f; }
  // Of either sign, sizes spread evenly over 2^-8 to 2^8: sums of such show the order they were taken in.
  float wide() { return std::ldexp(unit(), static_cast<int>(below(17)) - 8); }
  // A whole number of small size: sums of their products are exact in fp32, in any order.
  float whole() { return static_cast<float>(static_cast<int>(below(17)) - 8); }

 private:
  std::mt19937 engine_;
};

// How the rows of a matrix lie in memory.
enum class Layout {
  kAligned,  // each row on a cache line
  kTight,    // one row after the other, the last one up to the end of its memory
  kApart,    // as kTight, with other data between the rows: interleaved projections
  kOdd,      // at odd addresses: weights in a file whose header has an odd length
};

inline constexpr Layout kWeightLayouts[] = {Layout::kAligned, Layout::kTight, Layout::kApart, Layout::kOdd};
inline constexpr Layout kActivationLayouts[] = {Layout::kAligned, Layout::kTight, Layout::kApart};

// bf16 rows in memory; what is between the rows is NaN.
class Matrix {
 public:
  template <class Next>
  Matrix(uint32_t rows, uint32_t columns, Layout layout, Next next)
      : rows_(rows), columns_(columns), stride_(stride_of(columns, layout)), bytes_(memory(layout)) {
    for (uint32_t r = 0; r < rows; ++r) {
      for (uint32_t c = 0; c < columns; ++c) {
        const bf16 value = to_bf16(next());
        std::memcpy(bytes_.data() + r * stride_ + c * sizeof value, &value, sizeof value);
      }
    }
  }

  uint32_t rows() const { return rows_; }
  uint32_t columns() const { return columns_; }

  WeightView weights() const { return {bytes_.data(), static_cast<ptrdiff_t>(stride_)}; }
  RowsView activations(const int32_t* index = nullptr) const {
    return {reinterpret_cast<const bf16*>(bytes_.data()), stride_ / sizeof(bf16), index};
  }

  // Row r by the scalar decoder.
  std::vector<float> row(uint32_t r) const {
    std::vector<float> values(columns_);
    formats::Bf16::decode({bytes_.data(), static_cast<ptrdiff_t>(stride_), static_cast<uint32_t>(columns_)},
                          r, values.data());
    return values;
  }

  Matrix copy(Layout layout) const {
    std::vector<float> values;
    for (uint32_t r = 0; r < rows_; ++r)
      for (float x : row(r)) values.push_back(x);
    return Matrix(rows_, columns_, layout, [&, i = size_t{0}]() mutable { return values[i++]; });
  }

 private:
  static size_t stride_of(uint32_t columns, Layout layout) {
    const size_t row = columns * sizeof(bf16);
    switch (layout) {
      case Layout::kAligned: return round_up(row, kCacheLine);
      case Layout::kTight: return row;
      case Layout::kApart: return 2 * row + 6;
      case Layout::kOdd: return row + 1;
    }
    return row;
  }
  Guarded<std::byte> memory(Layout layout) const {
    const size_t bytes = (rows_ - 1) * stride_ + columns_ * sizeof(bf16);
    return layout == Layout::kAligned ? Guarded<std::byte>::on_cache_line(bytes) : Guarded<std::byte>(bytes);
  }

  uint32_t rows_, columns_;
  size_t stride_;  // bytes
  Guarded<std::byte> bytes_;
};

// Rows to gather: with gaps, repeated, in no order.
inline std::vector<int32_t> random_index(Random& random, uint32_t m, uint32_t rows) {
  std::vector<int32_t> index(m);
  for (int32_t& i : index) i = static_cast<int32_t>(random.below(rows));
  return index;
}

// Decoded rows as another type; reading them once keeps the tests quick where floating point is emulated.
template <class T>
std::vector<std::vector<T>> rows_as(const Matrix& matrix) {
  std::vector<std::vector<T>> rows;
  for (uint32_t r = 0; r < matrix.rows(); ++r) {
    const std::vector<float> row = matrix.row(r);
    rows.emplace_back(row.begin(), row.end());
  }
  return rows;
}

// An operand made by pack, with the memory it may refer to.
struct Packed {
  Guarded<std::byte> memory;
  Operand operand;
  Packed(const KernelTable& table, const RowsView& rows, uint32_t m, uint32_t k)
      : memory(Guarded<std::byte>::on_cache_line(table.operand_bytes(m, k))),
        operand(table.pack(rows, m, k, memory.data())) {}
};

// A C block and the scratch of the products that fill it.
class Block {
 public:
  Block(const KernelTable& table, uint32_t m, uint32_t n0, uint32_t n1)
      : table_(table),
        m_(m),
        n0_(n0),
        n1_(n1),
        c_(Guarded<float>::on_cache_line(table.c_floats(m, n1 - n0))) {}

  void multiply(const Operand& x, const WeightView& w, bool accumulate = false) {
    const auto scratch = Guarded<std::byte>::on_cache_line(table_.nt_scratch_bytes(x.k));
    kernels::NtArgs args;
    args.x = x, args.w = w;
    args.n0 = n0_, args.n1 = n1_;
    args.c = c_.data(), args.accumulate = accumulate, args.scratch = scratch.data();
    (x.quantized ? table_.nt_int8 : table_.nt)[static_cast<size_t>(w.format)](args);
  }

  const float* c() const { return c_.data(); }

  // [m][n1 - n0], row-major.
  std::vector<float> rows(const float* bias = nullptr) const {
    const uint32_t n = n1_ - n0_;
    const Guarded<float> y(size_t{m_} * n);
    kernels::StoreRowsArgs args;
    args.c = c_.data(), args.bias = bias;
    args.m = m_, args.n = n, args.y = y.data(), args.y_stride = n;
    table_.store_rows(args);
    return {y.begin(), y.end()};
  }

 private:
  const KernelTable& table_;
  uint32_t m_, n0_, n1_;
  Guarded<float> c_;
};

// X W^T for the outputs [n0, n1), row-major.
inline std::vector<float> product(const KernelTable& table, const Operand& x, const WeightView& w,
                                  uint32_t n0, uint32_t n1) {
  Block block(table, x.rows, n0, n1);
  block.multiply(x, w);
  return block.rows();
}

inline bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// Where two lists first differ in a bit, or -1.
inline ptrdiff_t first_difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return static_cast<ptrdiff_t>(std::min(a.size(), b.size()));
  for (size_t i = 0; i < a.size(); ++i)
    if (!same_bits(a[i], b[i])) return static_cast<ptrdiff_t>(i);
  return -1;
}

// bf16 values in order, as integers one apart: the difference of two is their distance in units in the last
// place.
inline int32_t bf16_rank(bf16 x) {
  return (x.bits & 0x8000) ? -static_cast<int32_t>(x.bits & 0x7fff) : x.bits;
}

}  // namespace ktmoe::test

namespace doctest {
template <>
struct StringMaker<ktmoe::Isa> {
  static String convert(ktmoe::Isa isa) { return ktmoe::isa_name(isa).data(); }
};
}  // namespace doctest
