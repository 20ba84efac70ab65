#include "moe/weights/expert_weights.h"

#include "core/error.h"
#include "kernels/table.h"

namespace ktmoe {
namespace {

// Items [map[i] * width, (map[i] + 1) * width) for each i, where items and experts are as many.
template <class Item>
std::vector<Item> permuted(const std::vector<Item>& logical, std::span<const int64_t> map) {
  std::vector<Item> physical;
  physical.reserve(logical.size());
  const size_t width = logical.size() / map.size();
  for (size_t i = 0; i < map.size() && width != 0; ++i) {
    const auto first = logical.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(map[i]) * width);
    physical.insert(physical.end(), first, first + static_cast<ptrdiff_t>(width));
  }
  return physical;
}

}  // namespace

void ExpertWeights::permute(std::span<const int64_t> map) {
  const auto experts = static_cast<int64_t>(map.size());
  for (size_t i = 0; i < map.size(); ++i) {
    if (map[i] < 0 || map[i] >= experts)
      throw_out_of_range("physical_to_logical_map: got expert ", map[i], " at ", i, ", expected 0 to ",
                         experts - 1);
  }
  for (auto* views : {&matrices.gate, &matrices.up, &matrices.down}) *views = permuted(*views, map);
  for (auto* values : {&biases.gate, &biases.up, &biases.down}) *values = permuted(*values, map);
  logical.assign(map.begin(), map.end());
}

std::vector<float> read_biases(const void* values, kernels::FloatType type, size_t count) {
  if (type == kernels::FloatType::kFloat32) {
    const auto* floats = static_cast<const float*>(values);
    return {floats, floats + count};
  }
  std::vector<float> floats(count);
  kernels::active_table().elementwise.widen(static_cast<const bf16*>(values), count, floats.data());
  return floats;
}

}  // namespace ktmoe
