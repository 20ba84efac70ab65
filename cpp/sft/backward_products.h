// The products through a weight (NN) that the steps of the backward pass are made of.
#pragma once

#include "sft/training_pass.h"

namespace ktmoe {

inline kernels::KeptRows kept_from(const kernels::KeptRows& all, size_t row, size_t column) {
  const size_t at = row * all.stride + column;
  const size_t bytes = at * (all.type == kernels::FloatType::kBf16 ? sizeof(bf16) : sizeof(float));
  const auto moved = [&](void* p) { return p ? static_cast<std::byte*>(p) + bytes : nullptr; };
  return {moved(all.gate), moved(all.up), all.type, all.h + at, all.stride};
}

// C[m, k - k0] (+)= G W for columns [k0, k1), with what the caller has said of the rest.
inline void through_rows(const TrainingPass& pass, FormatId format, const kernels::Operand& g,
                         const WeightView& w, Span columns, kernels::NnArgs nn) {
  nn.g = g, nn.w = w;
  nn.k0 = columns.begin, nn.k1 = columns.end;
  pass.kernels().nn[static_cast<size_t>(format)](nn);
}

// Where a product goes.
inline kernels::NnArgs into(float* c, size_t c_stride, bool accumulate, std::byte* scratch) {
  kernels::NnArgs nn;
  nn.c = c, nn.c_stride = c_stride, nn.accumulate = accumulate, nn.scratch = scratch;
  return nn;
}

// to[m, :] = bf(scale * G B) for an adapter's B [N, R], rows of R.
inline void rounded_product(const TrainingPass& pass, BackwardScratch& scratch, const kernels::Operand& g,
                            const WeightView& b, float scale, bf16* to) {
  const uint32_t rank = pass.rank();
  for (uint32_t r = 0; r < rank; r += pass.rows.columns) {
    const Span columns{r, std::min(r + pass.rows.columns, rank)};
    through_rows(pass, FormatId::kBf16, g, b, columns,
                 into(scratch.c, columns.size(), false, scratch.products));
    for (uint32_t m = 0; m < g.rows; ++m) {
      const float* c = scratch.c + size_t{m} * columns.size();
      for (uint32_t i = 0; i < columns.size(); ++i) to[size_t{m} * rank + r + i] = to_bf16(scale * c[i]);
    }
  }
}

// What packs left operands one behind the other into a worker's memory.
class LeftPacker {
 public:
  LeftPacker(const TrainingPass& pass, BackwardScratch& scratch)
      : table_(pass.kernels()), scratch_(scratch) {}

  void add(const kernels::RowsView& rows, uint32_t m, uint32_t n) {
    scratch_.packed.parts.push_back(table_.pack_left(rows, m, n, scratch_.left + at_));
    at_ += round_up(table_.left_bytes(m, n), kCacheLine);
  }

 private:
  const kernels::KernelTable& table_;
  BackwardScratch& scratch_;
  size_t at_ = 0;
};

// Zeroes what dropout drops in rows of an adapter's gradient.
inline void drop_columns(const MaskView& mask, const int32_t* tokens, uint32_t rows, Span columns, float* l) {
  for (uint32_t m = 0; m < rows; ++m)
    apply_mask(mask.row(tokens[m]), columns.begin, columns.size(), l + size_t{m} * columns.size());
}

}  // namespace ktmoe
