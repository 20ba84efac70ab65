// The split of a batch's routing in Python.
#include "bindings/streams/split_slots.h"

#include "core/error.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"

namespace ktmoe::bindings {
namespace {

// Integers of either size.
SlotSplit::Integers integers(const Array& array, const Dims& shape) {
  array.expect({DType::kInt64, DType::kInt32}, shape).expect_contiguous();
  if (array.dtype() == DType::kInt64) return array.as<const int64_t>();
  return array.as<const int32_t>();
}

}  // namespace

PythonSplit::PythonSplit(nb::handle topk_ids, nb::handle topk_weights, nb::handle immediate_ids,
                         nb::handle deferred_ids, int64_t num_experts, int64_t num_deferred,
                         nb::handle num_tokens)
    : held_(std::make_shared<HeldSplit>()) {
  std::vector<Array>& arrays = held_->arrays;
  SlotSplit& split = held_->split;
  arrays.reserve(5);
  const auto read = [&](nb::handle array, const char* name) -> const Array& {
    return arrays.emplace_back(Array::read(array, name));
  };
  const auto write = [&](nb::handle array, const char* name, const Dims& shape) {
    const Array& to = arrays.emplace_back(Array::write(array, name));
    to.expect({DType::kInt64}, shape).expect_contiguous();
    for (const Array& other : arrays)
      if (&other != &to) to.expect_disjoint(other);
    return to.as<int64_t>();
  };
  const Array& ids = read(topk_ids, "topk_ids");
  split.ids = integers(ids, {"T", "P"});
  const int64_t tokens = ids.shape(0), slots = ids.shape(1);
  if (tokens * slots > INT32_MAX)
    throw_invalid("topk_ids: got ", tokens, " tokens, expected at most ", INT32_MAX / slots);
  if (num_experts < 1 || num_experts > INT32_MAX)
    throw_invalid("num_experts: got ", num_experts, ", expected 1 to ", INT32_MAX);
  if (num_deferred < 0 || num_deferred > slots)
    throw_invalid("num_deferred: got ", num_deferred, ", expected 0 to ", slots);
  const Array& weights = read(topk_weights, "topk_weights");
  weights.expect({DType::kFloat32}, {tokens, slots}).expect_contiguous();
  split.weights = weights.as<float>();
  split.num_tokens = static_cast<uint32_t>(tokens), split.num_slots = static_cast<uint32_t>(slots);
  split.num_experts = static_cast<uint32_t>(num_experts);
  split.num_deferred = static_cast<uint32_t>(num_deferred);
  if (!num_tokens.is_none()) split.num_used = integers(read(num_tokens, "num_tokens"), {1});
  split.immediate = write(immediate_ids, "immediate_ids", {tokens, slots});
  if (num_deferred > 0) split.deferred = write(deferred_ids, "deferred_ids", {tokens, slots});
}

// The tasks of its parts share what it holds, and are not shown; then nothing of it can be garbage yet.
int PythonSplit::traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const auto& held = nb::inst_ptr<PythonSplit>(self)->held_;
  return held.use_count() == 1 ? visit_arrays(held->arrays, visit, arg) : 0;
}

int PythonSplit::clear(PyObject* self) {
  const auto empty = std::make_shared<HeldSplit>();
  nb::inst_ptr<PythonSplit>(self)->held_ = empty;
  return 0;
}

PyType_Slot PythonSplit::slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&PythonSplit::traverse)},
                                    {Py_tp_clear, reinterpret_cast<void*>(&PythonSplit::clear)},
                                    {0, nullptr}};

SplitPart::SplitPart(const GeneralMOEConfig& c, const PythonSplit& split, nb::handle deferred_out,
                     ForwardArrays& batch, int64_t first_token)
    : held_(split.held()) {
  const SlotSplit& s = held_->split;
  const uint32_t num_tokens = batch.args().num_tokens;
  if (s.num_tokens != num_tokens || s.num_slots != c.num_experts_per_tok)
    throw_invalid("split: got one of ", s.num_tokens, " tokens and ", s.num_slots, " slots, expected ",
                  num_tokens, " and ", c.num_experts_per_tok);
  if (deferred_out.is_none()) return;
  if (s.deferred == nullptr) throw_invalid("deferred_out: got one, expected None: no slot is deferred");
  const Array sums = Array::write(deferred_out, "deferred_out");
  sums.expect({DType::kFloat32}, {s.num_tokens, c.hidden_size}).expect_contiguous();
  batch.expect_disjoint_from(sums);
  batch.hold(sums);
  ids_ = s.deferred + first_token * c.num_experts_per_tok;
  out_ = sums.as<float>() + first_token * c.hidden_size;
}

void SplitPart::run(MoE_Interface& layer, ForwardArgs args) const {
  SlotSplit& split = held_->split;
  if (!split.is_joint) return layer.forward(args);
  if (out_ == nullptr) return;
  args.deferred_ids = ids_, args.deferred_out = out_;
  try {
    layer.forward(args);
  } catch (...) {
    split.is_joint = false;  // so the other part fails by itself
    throw;
  }
}

void bind_split_slots(nb::module_& m) {
  nb::class_<PythonSplit>(m, "SlotSplit",
                          R"(A batch's routing in two: what is computed at once, and what is deferred.

Immediate are, of each token, all but `num_deferred` slots: those with the largest weights, ties by slot.

Parameters
----------
topk_ids : array of int64 or int32 [T, P]
topk_weights : array of float32 [T, P]
immediate_ids : array of int64 [T, P]
    Written: the ids of immediate slots, -1 elsewhere.
deferred_ids : array of int64 [T, P], or None
    Written, when any are deferred: the others.
num_experts : int
num_deferred : int
    Slots of each token that are deferred, at most.
num_tokens : array of int64 or int32 [1], optional
    Read when the task runs: tokens from that number on have no ids.)",
                          nb::type_slots(PythonSplit::slots))
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, int64_t, int64_t, nb::handle>(),
           nb::arg("topk_ids"), nb::arg("topk_weights"), nb::arg("immediate_ids"),
           nb::arg("deferred_ids").none(), nb::arg("num_experts"), nb::arg("num_deferred") = 0,
           nb::arg("num_tokens").none() = nb::none())
      .def(
          "task",
          [](const PythonSplit& self) { return PythonTask([held = self.held()] { held->split.run(); }); },
          R"(The task that splits, before those of the parts.

Raises, when it is run
----------------------
IndexError
    An id of num_experts or above, or a number of tokens outside 0 to T; the parts are then refused too.)")
      .def_prop_ro(
          "is_joint", [](const PythonSplit& self) { return self.held()->split.is_joint; },
          "Whether the first part computes both, when the task has run: they share many experts.");
}

}  // namespace ktmoe::bindings
