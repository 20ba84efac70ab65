#include "bindings/convert/lora_arrays.h"

#include "core/error.h"

namespace ktmoe::bindings {

Dims lora_dims(const MOESFTConfig& config, size_t id) {
  const LoraShape shape = lora_shape(config, static_cast<LoraId>(id));
  return {config.expert_num, int64_t{shape.rows}, int64_t{shape.columns}};
}

const char* lora_name(const MOESFTConfig& config, size_t id) {
  return lora_shape(config, static_cast<LoraId>(id)).name;
}

void check_lora_exists(const MOESFTConfig& config, const char* name, bool is_up) {
  if (is_up && !config.activation.gated)
    throw_invalid(name, ": got one, expected None: the activation is not gated");
}

bool is_up_lora(size_t id) {
  return id == static_cast<size_t>(LoraId::kUpA) || id == static_cast<size_t>(LoraId::kUpB);
}

LoraSources read_lora(const MOESFTConfig& config, const LoraHandles& handles, Arrays& owners) {
  LoraSources sources;
  for (size_t i = 0; i < kNumLora; ++i) {
    if (handles[i].is_none()) continue;
    const char* name = lora_name(config, i);
    check_lora_exists(config, name, is_up_lora(i));
    const Array& a = owners.emplace_back(Array::read(handles[i], name));
    a.expect({DType::kFloat32, DType::kBf16}, lora_dims(config, i)).expect_contiguous();
    sources[i] = {a.as<void>(), float_type(a)};
  }
  return sources;
}

}  // namespace ktmoe::bindings
