// What the tests of products that sum over rows share: lhs operands, and results in memory.
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "kernel_helpers.h"
#include "kernels/contract_training.h"

namespace ktmoe::test {

// An lhs operand, with the memory it may refer to.
struct Lhs {
  Guarded<std::byte> memory;
  Operand operand;
  Lhs(const KernelTable& table, const RowsView& rows, uint32_t m, uint32_t n)
      : memory(Guarded<std::byte>::on_cache_line(table.lhs_bytes(m, n))),
        operand(table.pack_lhs(rows, m, n, memory.data())) {}
};

// C, with a row stride of `gap` floats.
class Output {
 public:
  Output(const KernelTable& table, uint32_t m, uint32_t k0, uint32_t k1, uint32_t gap = 0)
      : table_(table), k0_(k0), k1_(k1), stride_(k1 - k0 + gap), c_(size_t{m} * stride_ - gap) {}

  void multiply(const Operand& g, const WeightView& w, bool accumulate = false) {
    const kernels::NnTerm term{g, 0, g.k, w};
    multiply({&term, 1}, accumulate);
  }
  void multiply(std::span<const kernels::NnTerm> terms, bool accumulate = false) {
    const auto scratch = Guarded<std::byte>::on_cache_line(table_.nn_scratch_bytes());
    kernels::NnArgs args;
    args.terms = terms, args.k0 = k0_, args.k1 = k1_;
    args.c = c_.data(), args.c_stride = stride_, args.accumulate = accumulate, args.scratch = scratch.data();
    table_.nn(args);
  }

  // [m][k1 - k0], row-major.
  std::vector<float> rows() const {
    std::vector<float> rows;
    for (size_t i = 0; i < c_.size(); ++i)
      if (i % stride_ < k1_ - k0_) rows.push_back(c_[i]);
    return rows;
  }
  bool gaps_are_untouched() const {
    for (size_t i = 0; i < c_.size(); ++i)
      if (i % stride_ >= k1_ - k0_ && !std::isnan(c_[i])) return false;
    return true;
  }

 private:
  const KernelTable& table_;
  uint32_t k0_, k1_;
  size_t stride_;
  Guarded<float> c_;
};

inline std::vector<float> nn_product(const KernelTable& table, const Operand& g, const WeightView& w,
                                     uint32_t k0, uint32_t k1) {
  Output out(table, g.rows, k0, k1);
  out.multiply(g, w);
  return out.rows();
}

}  // namespace ktmoe::test
