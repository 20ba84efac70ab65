#include "sft/lora.h"

#include <cstring>

#include "kernels/table.h"

namespace ktmoe {

LoraShape lora_shape(const MOESFTConfig& config, LoraId id) {
  const auto rank = static_cast<uint32_t>(config.lora_rank);
  const auto hidden = static_cast<uint32_t>(config.hidden_size);
  const auto inter = static_cast<uint32_t>(config.intermediate_size);
  const bool gated = config.activation.gated;
  switch (id) {
    case LoraId::kGateA: return {"gate_lora_a", rank, hidden};
    case LoraId::kGateB: return {"gate_lora_b", inter, rank};
    case LoraId::kUpA: return {"up_lora_a", gated ? rank : 0, hidden};
    case LoraId::kUpB: return {"up_lora_b", gated ? inter : 0, rank};
    case LoraId::kDownA: return {"down_lora_a", rank, inter};
    case LoraId::kDownB: return {"down_lora_b", hidden, rank};
  }
  return {};
}

LoraWeights::LoraWeights(const MOESFTConfig& config, const LoraSources& sources)
    : num_experts_(static_cast<size_t>(config.expert_num)) {
  size_t size = 0;
  for (size_t i = 0; i < kNumLora; ++i) {
    shapes_[i] = lora_shape(config, static_cast<LoraId>(i));
    begin_[i] = size;
    size += round_up(num_experts_ * shapes_[i].size(), kCacheLine / sizeof(bf16));
  }
  values_.reserve(size * sizeof(bf16));
  if (size) std::memset(values_.data(), 0, size * sizeof(bf16));
  for (size_t i = 0; i < kNumLora; ++i)
    for (size_t e = 0; e < num_experts_; ++e) copy(static_cast<LoraId>(i), e, sources[i]);
}

LoraWeights::LoraWeights(const LoraWeights& other)
    : num_experts_(other.num_experts_),
      shapes_(other.shapes_),
      begin_(other.begin_),
      values_(other.values_.capacity()) {
  if (values_.capacity()) std::memcpy(values_.data(), other.values_.data(), values_.capacity());
}

void LoraWeights::update(const LoraSources& sources, WorkerPool& pool) {
  pool.run(static_cast<uint32_t>(num_experts_ * kNumLora), [&](const Worker&, int, uint32_t task) {
    const size_t id = task / num_experts_;
    copy(static_cast<LoraId>(id), task % num_experts_, sources[id]);
  });
}

void LoraWeights::copy(LoraId id, size_t expert, const LoraSource& source) {
  const size_t size = shapes_[static_cast<size_t>(id)].size();
  if (source.data == nullptr || size == 0) return;
  bf16* to = matrices(id) + expert * size;
  if (source.type == kernels::FloatType::kBf16) {
    std::memcpy(to, static_cast<const bf16*>(source.data) + expert * size, size * sizeof(bf16));
  } else {
    kernels::active_table().elementwise.round(static_cast<const float*>(source.data) + expert * size, size,
                                              to);
  }
}

WeightView LoraWeights::view(LoraId id, size_t expert) const {
  const LoraShape& shape = shapes_[static_cast<size_t>(id)];
  return {reinterpret_cast<const std::byte*>(matrices(id) + expert * shape.size()),
          static_cast<ptrdiff_t>(shape.columns * sizeof(bf16)), shape.columns};
}

}  // namespace ktmoe
