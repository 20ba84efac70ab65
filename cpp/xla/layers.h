// The layers that XLA's programs may call, by number: a compiled program can hold nothing else of a layer.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "runtime/cpuinfer.h"
#include "sft/interface.h"

namespace ktmoe::xla {

struct CalledLayer {
  std::shared_ptr<CPUInfer> engine;
  std::shared_ptr<MoE_Interface> layer;
  std::shared_ptr<MoE_SFT_Interface> training;  // the same, or null
  std::vector<uint8_t> skip_experts;            // [E], or empty
  uint32_t num_deferred = 0;                    // experts of a token, of calls that defer
};

class Layers {
 public:
  static Layers& all();

  int32_t add(std::shared_ptr<CalledLayer> layer);
  void remove(int32_t number);  // calls under way keep it until they are done
  // std::runtime_error when it is gone.
  std::shared_ptr<CalledLayer> at(int32_t number);

 private:
  std::mutex mutex_;
  std::unordered_map<int32_t, std::shared_ptr<CalledLayer>> layers_;
  int32_t last_ = 0;
};

}  // namespace ktmoe::xla
