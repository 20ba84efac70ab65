#include "xla/layers.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <utility>

#include "core/error.h"
#include "runtime/per_process.h"

namespace ktmoe::xla {

Layers& Layers::all() { return of_this_process<Layers>(); }

int32_t Layers::add(Layer layer) {
  std::vector<Layer> unused;  // destroyed when the lock is released
  const std::lock_guard lock(mutex_);
  unused = take_unused();
  static std::atomic<int32_t> last{0};  // numbers of a parent process are not used again
  const int32_t number = ++last;
  layers_[number] = std::move(layer);
  return number;
}

void Layers::remove(int32_t number) {
  std::vector<Layer> unused;
  const std::lock_guard lock(mutex_);
  const auto found = layers_.find(number);
  if (found != layers_.end()) {
    removed_.push_back(std::move(found->second));
    layers_.erase(found);
  }
  unused = take_unused();
}

// Of those that were removed.
std::vector<Layers::Layer> Layers::take_unused() {
  std::vector<Layer> unused;
  const auto is_used = [](const Layer& layer) { return layer.use_count() > 1; };
  const auto end = std::partition(removed_.begin(), removed_.end(), is_used);
  std::move(end, removed_.end(), std::back_inserter(unused));
  removed_.erase(end, removed_.end());
  return unused;
}

std::shared_ptr<CalledLayer> Layers::at(int32_t number) {
  const std::lock_guard lock(mutex_);
  const auto found = layers_.find(number);
  if (found == layers_.end())
    throw_runtime("the layer is gone, expected one that lives as long as the programs that call it");
  return found->second;
}

}  // namespace ktmoe::xla
