#include "sft/backward_products.h"

#include <algorithm>

namespace ktmoe {

kernels::KeptRows kept_from(const kernels::KeptRows& all, size_t row, size_t column) {
  const size_t at = row * all.stride + column;
  const size_t bytes = at * (all.type == kernels::FloatType::kBf16 ? sizeof(bf16) : sizeof(float));
  const auto moved = [&](void* p) { return p ? static_cast<std::byte*>(p) + bytes : nullptr; };
  return {moved(all.gate), moved(all.up), all.type, all.h + at, all.stride};
}

void add_terms(const TrainingPass& pass, const kernels::Operand& g,
               std::vector<WeightView> ExpertMatrices::* matrices, Span OutputShare::* share, size_t e,
               std::vector<kernels::NnTerm>& terms) {
  for (const WeightSegment& part : pass.segments) {
    const Span rows = part.rows.*share;
    if (rows.size() == 0) continue;
    const WeightView& w = (part.matrices->*matrices)[e];
    terms.push_back({g, rows.begin, rows.end, w.from(rows.begin)});
  }
}

kernels::NnTerm adapter_term(const TrainingPass& pass, const kernels::Operand& g, LoraId a,
                             const BlockTask& task) {
  return {g, 0, pass.rank(), pass.adapter(a, task)};
}

void multiply_terms(const TrainingPass& pass, std::span<const kernels::NnTerm> terms, Span columns, float* c,
                    size_t c_stride, std::byte* scratch, kernels::NnArgs nn) {
  nn.terms = terms;
  nn.k0 = columns.begin, nn.k1 = columns.end;
  nn.c = c, nn.c_stride = c_stride, nn.scratch = scratch;
  pass.kernels().nn(nn);
}

void rounded_product(const TrainingPass& pass, BackwardScratch& scratch, const kernels::Operand& g,
                     const WeightView& b, float scale, bf16* to, size_t stride) {
  const uint32_t rank = pass.rank();
  const kernels::NnTerm term{g, 0, g.k, b};
  for (uint32_t r = 0; r < rank; r += pass.rows.columns) {
    const Span columns{r, std::min(r + pass.rows.columns, rank)};
    multiply_terms(pass, {&term, 1}, columns, scratch.c, columns.size(), scratch.products);
    for (uint32_t m = 0; m < g.rows; ++m) {
      const float* c = scratch.c + size_t{m} * columns.size();
      pass.kernels().elementwise.round_scaled(c, scale, columns.size(), to + m * stride + r);
    }
  }
}

void drop_columns(const kernels::KernelTable& kernels, const MaskView& mask, const int32_t* tokens,
                  uint32_t rows, Span columns, float* l) {
  for (uint32_t m = 0; m < rows; ++m, l += columns.size())
    kernels.elementwise.mask_float(l, mask.row(tokens[m]), columns.begin, columns.size(), l);
}

}  // namespace ktmoe
