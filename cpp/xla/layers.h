// The layers that XLA programs may call, by number: a compiled program cannot refer to a layer in any other
// way.
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
  ActivationDtype activation_dtype = ActivationDtype::kDefault;
  uint32_t chunk_size = 0;  // tokens that are computed at a time, at most; 0: all
};

class Layers {
 public:
  static Layers& all();

  int32_t add(std::shared_ptr<CalledLayer> layer);
  // Calls under way use it until they are done. Then a later add or remove destroys it, never a call: it may
  // be the last to refer to objects of Python, which threads of XLA and of the driver must not destroy.
  void remove(int32_t number);
  // std::runtime_error when it is gone.
  std::shared_ptr<CalledLayer> at(int32_t number);

 private:
  std::mutex mutex_;
  using Layer = std::shared_ptr<CalledLayer>;
  std::vector<Layer> take_unused();

  std::unordered_map<int32_t, Layer> layers_;
  std::vector<Layer> removed_;
};

}  // namespace ktmoe::xla
