// The split of a batch's routing as Python holds it, for the tasks of its parts.
#pragma once

#include <memory>
#include <vector>

#include "bindings/convert/arrays.h"
#include "bindings/convert/forward_arrays.h"
#include "moe/layer/interface.h"
#include "moe/plan/split_slots.h"

namespace ktmoe::bindings {

struct HeldSplit {
  std::vector<Array> arrays;  // what the split refers to
  SlotSplit split;
};

// Copied and destroyed with the GIL held.
class PythonSplit {
 public:
  PythonSplit(nb::handle topk_ids, nb::handle topk_weights, nb::handle immediate_ids, nb::handle deferred_ids,
              int64_t num_experts, int64_t num_deferred, nb::handle num_tokens);

  const std::shared_ptr<HeldSplit>& held() const { return held_; }

  static PyType_Slot slots[];  // for the cycle collector

 private:
  static int traverse(PyObject* self, visitproc visit, void* arg);
  static int clear(PyObject* self);

  std::shared_ptr<HeldSplit> held_;
};

// One part of a batch that is split, or some tokens of it: the first, which is given where to put the sums of
// the other, or that other one.
class SplitPart {
 public:
  // ValueError when the split is of another batch.
  SplitPart(const GeneralMOEConfig& config, const PythonSplit& split, nb::handle deferred_out,
            ForwardArrays& batch, int64_t first_token);

  // The first part computes the other along with it when they are joint; then there is nothing left of that.
  void run(MoE_Interface& layer, ForwardArgs args) const;

 private:
  std::shared_ptr<HeldSplit> held_;
  const int64_t* ids_ = nullptr;
  float* out_ = nullptr;  // null: the other part
};

}  // namespace ktmoe::bindings
