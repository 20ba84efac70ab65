// The low-rank adapters of a layer: their bf16 values, copied from the caller's arrays.
#pragma once

#include <array>
#include <cstdint>

#include "core/aligned_buffer.h"
#include "core/types.h"
#include "formats/format.h"
#include "kernels/contract.h"
#include "sft/config.h"

namespace ktmoe {

enum class LoraId : uint8_t { kGateA, kGateB, kUpA, kUpB, kDownA, kDownB };
inline constexpr size_t kNumLora = 6;

// One matrix per expert, [rows, columns].
struct LoraShape {
  const char* name;
  uint32_t rows, columns;
  size_t size() const { return size_t{rows} * columns; }
};

// A [R, K] and B [N, R] of a projection from K features to N. A layer without a gate has no adapters of up:
// size 0.
LoraShape lora_shape(const MOESFTConfig& config, LoraId id);

// An array of all experts, bf16 or float32, contiguous; null leaves a matrix unchanged.
struct LoraSource {
  const void* data = nullptr;
  kernels::FloatType type = kernels::FloatType::kFloat32;
};
using LoraSources = std::array<LoraSource, kNumLora>;

class LoraWeights {
 public:
  // Zero where no source is given. Rounds and copies on the calling thread.
  explicit LoraWeights(const MOESFTConfig& config, const LoraSources& sources = {});
  LoraWeights(const LoraWeights& other);
  LoraWeights& operator=(const LoraWeights&) = delete;

  // Rounds and copies the given sources, on the pool's threads.
  void update(const LoraSources& sources, WorkerPool& pool);

  // Rows of one expert's matrix.
  WeightView view(LoraId id, size_t expert) const;
  size_t bytes() const { return values_.capacity(); }

 private:
  void copy(LoraId id, size_t expert, const LoraSource& source);
  bf16* matrices(LoraId id) const { return values_.as<bf16>() + begin_[static_cast<size_t>(id)]; }

  size_t num_experts_;
  std::array<LoraShape, kNumLora> shapes_;
  std::array<size_t, kNumLora> begin_;
  AlignedBuffer values_;
};

}  // namespace ktmoe
