// What a layer counts and measures of its passes, while it is asked to.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ktmoe {

// The steps of a pass, forward and backward, as stats and traces name them.
enum class Phase : uint8_t {
  kRoute,
  kScaleInputs,
  kQuantize,
  kGateUp,
  kDown,
  kCombine,
  kSaveInputs,
  kAdapters,
  kBackwardOutput,
  kBackwardActivation,
  kBackwardAdapters,
  kWeightGradients,
  kPackGradients,
  kBackwardInput,
  kRoutingGradients,
};

inline constexpr std::array kPhaseNames = {"route",
                                           "scale_inputs",
                                           "quantize",
                                           "gate_up",
                                           "down",
                                           "combine",
                                           "save_inputs",
                                           "adapters",
                                           "backward_output",
                                           "backward_activation",
                                           "backward_adapters",
                                           "weight_gradients",
                                           "pack_gradients",
                                           "backward_input",
                                           "routing_gradients"};
inline constexpr size_t kNumPhases = kPhaseNames.size();
static_assert(kNumPhases == static_cast<size_t>(Phase::kRoutingGradients) + 1);

struct PassStats {
  uint64_t forward_calls = 0, backward_calls = 0;
  uint64_t tokens = 0;           // of forward calls
  uint64_t rows = 0;             // tokens times the experts that computed them here
  uint64_t expert_readings = 0;  // experts with rows, over all passes: each reads its weights once
  int64_t nanoseconds = 0;       // of all passes
  std::array<int64_t, kNumPhases> phase_ns{};
  std::vector<uint64_t> expert_tokens;  // [E]: slots with that id, also those that are skipped by a mask
};

}  // namespace ktmoe
