// The split of a batch's routing in Python.
#include "moe/split_slots.h"

#include <memory>

#include "bindings/arrays.h"
#include "bindings/module.h"
#include "bindings/python_task.h"

namespace ktmoe::bindings {
namespace {

// Integers of either size.
SlotSplit::Integers integers(const Array& array, const Dims& shape) {
  array.expect({DType::kInt64, DType::kInt32}, shape).expect_contiguous();
  if (array.dtype() == DType::kInt64) return array.as<const int64_t>();
  return array.as<const int32_t>();
}

PythonTask split_slots_task(nb::handle topk_ids, nb::handle topk_weights, nb::handle immediate_ids,
                            nb::handle deferred_ids, int64_t num_deferred, nb::handle num_tokens) {
  auto arrays = std::make_shared<std::vector<Array>>();
  arrays->reserve(5);
  const auto read = [&](nb::handle array, const char* name) -> const Array& {
    return arrays->emplace_back(Array::read(array, name));
  };
  const auto write = [&](nb::handle array, const char* name, const Dims& shape) {
    const Array& to = arrays->emplace_back(Array::write(array, name));
    to.expect({DType::kInt64}, shape).expect_contiguous();
    for (const Array& other : *arrays)
      if (&other != &to) to.expect_disjoint(other);
    return to.as<int64_t>();
  };
  SlotSplit split;
  const Array& ids = read(topk_ids, "topk_ids");
  split.ids = integers(ids, {"T", "P"});
  const int64_t tokens = ids.shape(0), slots = ids.shape(1);
  if (tokens * slots > INT32_MAX) throw_invalid("topk_ids: got ", tokens, " tokens, expected fewer");
  if (num_deferred < 0 || num_deferred > slots)
    throw_invalid("num_deferred: got ", num_deferred, ", expected 0 to ", slots);
  const Array& weights = read(topk_weights, "topk_weights");
  weights.expect({DType::kFloat32}, {tokens, slots}).expect_contiguous();
  split.weights = weights.as<float>();
  split.num_tokens = static_cast<uint32_t>(tokens), split.num_slots = static_cast<uint32_t>(slots);
  split.num_deferred = static_cast<uint32_t>(num_deferred);
  if (!num_tokens.is_none()) split.num_used = integers(read(num_tokens, "num_tokens"), {1});
  split.immediate = write(immediate_ids, "immediate_ids", {tokens, slots});
  if (num_deferred > 0) split.deferred = write(deferred_ids, "deferred_ids", {tokens, slots});
  return PythonTask([arrays, split] { split.run(); });
}

}  // namespace

void bind_split_slots(nb::module_& m) {
  m.def("split_slots_task", &split_slots_task, nb::arg("topk_ids"), nb::arg("topk_weights"),
        nb::arg("immediate_ids"), nb::arg("deferred_ids").none() = nb::none(), nb::arg("num_deferred") = 0,
        nb::arg("num_tokens").none() = nb::none(),
        R"(A task that splits the routing of a batch: what is computed at once, and what is deferred.

Immediate are, of each token, all but `num_deferred` slots: those with the largest weights, ties by slot.

Parameters
----------
topk_ids : array of int64 or int32 [T, P]
topk_weights : array of float32 [T, P]
immediate_ids : array of int64 [T, P]
    Written: the ids of immediate slots, -1 elsewhere.
deferred_ids : array of int64 [T, P], optional
    Written, when any are deferred: the others.
num_deferred : int
    Slots of each token that are deferred, at most.
num_tokens : array of int64 or int32 [1], optional
    Read when the task runs: tokens from that number on have no ids.)");
}

}  // namespace ktmoe::bindings
