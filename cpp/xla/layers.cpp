#include "xla/layers.h"

#include <utility>

#include "core/error.h"

namespace ktmoe::xla {

Layers& Layers::all() {
  static Layers* layers = new Layers;  // threads of XLA may call until the process is gone
  return *layers;
}

int32_t Layers::add(std::shared_ptr<CalledLayer> layer) {
  const std::lock_guard lock(mutex_);
  layers_[++last_] = std::move(layer);
  return last_;
}

void Layers::remove(int32_t number) {
  std::shared_ptr<CalledLayer> removed;  // destroyed when the lock is released
  const std::lock_guard lock(mutex_);
  const auto found = layers_.find(number);
  if (found == layers_.end()) return;
  removed = std::move(found->second);
  layers_.erase(found);
}

std::shared_ptr<CalledLayer> Layers::at(int32_t number) {
  const std::lock_guard lock(mutex_);
  const auto found = layers_.find(number);
  if (found == layers_.end())
    throw_runtime("the layer is gone, expected one that lives as long as the programs that call it");
  return found->second;
}

}  // namespace ktmoe::xla
