#include "moe/deferred_pass.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <utility>

#include "bindings/convert/forward_arrays.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "core/error.h"

namespace ktmoe::bindings {
namespace {

// A layer's deferred output, and the array that it is in. Copied and destroyed with the GIL.
class PythonOutput {
 public:
  PythonOutput(std::shared_ptr<DeferredOutput> output, const Array& sums)
      : output_(std::move(output)), sums_(sums) {}

  const std::shared_ptr<DeferredOutput>& output() const { return output_; }
  const Array& sums() const { return sums_; }

  PythonTask rounding_task(nb::handle out) const {
    const auto arrays = std::make_shared<Arrays>(Arrays{Array::write(out, "out"), sums_});
    const Array& to = arrays->front();
    to.expect({DType::kBf16}, {output_->num_tokens(), output_->hidden_size()}).expect_contiguous();
    to.expect_disjoint(sums_);
    return PythonTask([arrays, output = output_] { output->round_to(arrays->front().as<bf16>()); }, arrays);
  }

 private:
  std::shared_ptr<DeferredOutput> output_;
  Array sums_;
};

// What the tasks of a pass share.
struct SharedPass {
  Arrays arrays;
  std::unique_ptr<DeferredPass> pass;
};

// Arrays of a pass as they are taken one by one: each that is written shares no memory with any other.
class PassArrays {
 public:
  explicit PassArrays(Arrays& arrays) : arrays_(arrays) {}

  Integers integers(nb::handle source, const char* name, const Dims& shape) {
    const Array& array = arrays_.emplace_back(Array::read(source, name));
    array.expect({DType::kInt64, DType::kInt32}, shape).expect_contiguous();
    if (array.dtype() == DType::kInt64) return array.as<const int64_t>();
    return array.as<const int32_t>();
  }

  template <class T>
  T* written(nb::handle target, const char* name, DType dtype, const Dims& shape) {
    const Array to = Array::write(target, name);
    to.expect({dtype}, shape).expect_contiguous();
    for (const Array& other : arrays_) to.expect_disjoint(other);
    return arrays_.emplace_back(to).as<T>();
  }

  // Null when there is none, or when it is the array itself: callers may compute in the buffers.
  template <class T>
  T* copy_of(const T* source, nb::handle target, const char* name, DType dtype, const Dims& shape) {
    if (target.is_none() || Array::write(target, name).as<T>() == source) return nullptr;
    return written<T>(target, name, dtype, shape);
  }

 private:
  Arrays& arrays_;
};

// What a pass needs to defer experts.
struct Deferring {
  int64_t num_deferred = 0;
  nb::handle ids, output, copied_hidden_states, copied_weights;
};

class PythonPass {
 public:
  PythonPass(std::shared_ptr<MoE_Interface> layer, nb::object hidden_states, nb::object topk_ids,
             nb::object topk_weights, nb::object out, nb::object immediate_ids, int64_t chunk_size,
             const Deferring& deferring, const PythonOutput* received, bool incremental,
             nb::object skip_experts, nb::object num_tokens,
             const std::optional<std::string>& activation_dtype, nb::object adapters)
      : shared_(std::make_shared<SharedPass>()) {
    const GeneralMOEConfig& c = layer->config();
    if (chunk_size < 1 || chunk_size > UINT32_MAX)
      throw_invalid("chunk_size: got ", chunk_size, ", expected 1 to ", UINT32_MAX);
    if (incremental && received != nullptr)
      throw_invalid("incremental: got True, but the output begins with the deferred experts of layer ",
                    received->output()->layer_idx(), ", expected False");
    DeferringBatch batch;
    batch.chunk_size = static_cast<uint32_t>(chunk_size);
    PassArrays arrays(shared_->arrays);
    const int64_t slots = c.num_experts_per_tok;
    batch.ids = arrays.integers(topk_ids, "topk_ids", {"T", slots});
    if (!num_tokens.is_none()) batch.num_used_tokens = arrays.integers(num_tokens, "num_tokens", {1});
    const int64_t tokens = shared_->arrays.front().shape(0);
    Array::write(immediate_ids, "immediate_ids").expect({DType::kInt64}, {tokens, slots}).expect_contiguous();
    // Chunks are computed from the immediate ids, not from those that are given.
    ForwardArrays forward(c, hidden_states, immediate_ids, topk_weights, out, skip_experts);
    forward.set_activation_dtype(activation_dtype_of(*layer, activation_dtype));
    if (incremental) forward.add_to_out();
    forward.set_adapters(adapters);
    for (const Array& array : shared_->arrays) forward.expect_out_disjoint_from(array);
    for (size_t i = 0; i < forward.arrays()->size(); ++i)
      if (i != ForwardArrays::kIds) shared_->arrays.push_back((*forward.arrays())[i]);
    batch.args = forward.args();
    batch.immediate_ids =
        arrays.written<int64_t>(immediate_ids, "immediate_ids", DType::kInt64, {tokens, slots});
    take_deferred(c, deferring, arrays, batch);
    if (received != nullptr) {
      forward.expect_out_disjoint_from(received->sums());
      shared_->arrays.push_back(received->sums());
    }
    shared_->pass = std::make_unique<DeferredPass>(std::move(layer), batch,
                                                   received == nullptr ? nullptr : received->output(),
                                                   output_ ? output_->output() : nullptr);
  }

  void check_ids() const { shared_->pass->check_ids(); }
  bool is_joint() const { return shared_->pass->is_joint(); }
  const std::optional<PythonOutput>& output() const { return output_; }

  nb::typed<nb::list, PythonTask> immediate_tasks() const {
    nb::typed<nb::list, PythonTask> tasks;
    tasks.append(PythonTask([shared = shared_] { shared->pass->split(); }));
    for (size_t i = 0; i < shared_->pass->num_chunks(); ++i)
      tasks.append(PythonTask([shared = shared_, i] { shared->pass->compute_immediate(i); }));
    return tasks;
  }

  nb::typed<nb::list, PythonTask> deferred_tasks() const {
    nb::typed<nb::list, PythonTask> tasks;
    for (size_t i = 0; output_ && i < shared_->pass->num_chunks(); ++i)
      tasks.append(PythonTask([shared = shared_, i] { shared->pass->compute_deferred(i); }));
    return tasks;
  }

  static PyType_Slot slots[];  // for the cycle collector

 private:
  void take_deferred(const GeneralMOEConfig& c, const Deferring& deferring, PassArrays& arrays,
                     DeferringBatch& batch) {
    const int64_t tokens = batch.args.num_tokens, slots = c.num_experts_per_tok, hidden = c.hidden_size;
    if (deferring.num_deferred < 0 || deferring.num_deferred > slots)
      throw_invalid("num_deferred: got ", deferring.num_deferred, ", expected 0 to ", slots);
    if (deferring.num_deferred == 0) return;
    batch.num_deferred = static_cast<uint32_t>(deferring.num_deferred);
    batch.deferred_ids =
        arrays.written<int64_t>(deferring.ids, "deferred_ids", DType::kInt64, {tokens, slots});
    auto* sums =
        arrays.written<float>(deferring.output, "deferred_output", DType::kFloat32, {tokens, hidden});
    output_.emplace(std::make_shared<DeferredOutput>(sums, c, batch.args.num_tokens), shared_->arrays.back());
    batch.copied_hidden_states = arrays.copy_of(batch.args.hidden_states, deferring.copied_hidden_states,
                                                "copied_hidden_states", DType::kBf16, {tokens, hidden});
    batch.copied_weights = arrays.copy_of(batch.args.topk_weights, deferring.copied_weights, "copied_weights",
                                          DType::kFloat32, {tokens, slots});
  }

  // The tasks share its arrays but are invisible to the collector: while any task exists, nothing is garbage.
  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!nb::inst_ready(self)) return 0;
    const auto& shared = nb::inst_ptr<PythonPass>(self)->shared_;
    return shared.use_count() == 1 ? visit_arrays(shared->arrays, visit, arg) : 0;
  }

  static int clear(PyObject* self) {
    const auto shared =
        std::exchange(nb::inst_ptr<PythonPass>(self)->shared_, std::make_shared<SharedPass>());
    return 0;
  }

  std::shared_ptr<SharedPass> shared_;
  std::optional<PythonOutput> output_;
};

PyType_Slot PythonPass::slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&PythonPass::traverse)},
                                   {Py_tp_clear, reinterpret_cast<void*>(&PythonPass::clear)},
                                   {0, nullptr}};

constexpr const char* kPassDoc =
    R"(A forward pass of a layer that defers experts, or that adds deferred experts of the previous layer.

Of each token, all but `num_deferred` experts are immediate: those with the largest weights, ties by slot.

Parameters
----------
layer : MoE_Interface
hidden_states : array of bfloat16 [T, H]
topk_ids : array of int64 or int32 [T, P]
    Read when the tasks run, like all other arrays.
topk_weights : array of float32 [T, P]
out : array of bfloat16 or float32 [T, H]
    Written: the deferred output of the previous layer plus the immediate experts.
immediate_ids : array of int64 [T, P]
    Written: the ids of immediate experts, -1 elsewhere.
chunk_size : int
    Maximum number of tokens per task.
num_deferred : int
    Maximum number of deferred experts per token.
deferred_ids : array of int64 [T, P], optional
    Written, when any are deferred: the other ids.
deferred_output : array of float32 [T, H], optional
    Written, when any are deferred: their sums.
copied_hidden_states, copied_weights : array of bfloat16 [T, H] and of float32 [T, P], optional
    Written: copies of the inputs of the deferred experts. None: hidden states and weights must not change
    until these have run.
received : DeferredOutput, optional
    The deferred output of the previous layer; if that failed, so does this pass.
incremental : bool
    Add to the contents of `out`; not with `received`.
skip_experts : array of bool [E], optional
num_tokens : array of int64 or int32 [1], optional
    Tokens from that number on are computed without experts.
activation_dtype : {"bfloat16", "int8"}, optional
    What products take activations in; None for the config's.
adapters : array of int32 [T], optional
    The number of each token's adapter, negative for none.

Raises
------
TypeError, ValueError
    An argument of another kind, dtype, order or shape, or arrays that overlap.)";

void bind_output(nb::module_& m) {
  nb::class_<PythonOutput>(m, "DeferredOutput",
                           "What a layer leaves for the next one: its deferred experts, weighted and summed.")
      .def_prop_ro("layer_idx", [](const PythonOutput& self) { return self.output()->layer_idx(); })
      .def_prop_ro("num_tokens", [](const PythonOutput& self) { return self.output()->num_tokens(); })
      .def_prop_ro(
          "sums", [](const PythonOutput& self) { return nb::object(nb::borrow(self.sums().object())); },
          "The array that the pass was given, float32 [T, H].")
      .def(
          "raise_error", [](const PythonOutput& self) { self.output()->rethrow(); },
          "When the tasks of the pass have run: raise the exception of the first that failed.")
      .def("rounding_task", &PythonOutput::rounding_task, nb::arg("out"),
           "Make the task that writes the sums to `out`, bfloat16 [T, H]; NaN if the pass failed.");
}

}  // namespace

void bind_deferred_pass(nb::module_& m) {
  bind_output(m);
  const auto make = [](PythonPass* self, std::shared_ptr<MoE_Interface> layer, nb::object hidden_states,
                       nb::object topk_ids, nb::object topk_weights, nb::object out, nb::object immediate_ids,
                       int64_t chunk_size, int64_t num_deferred, nb::object deferred_ids,
                       nb::object deferred_output, nb::object copied_hidden_states, nb::object copied_weights,
                       const PythonOutput* received, bool incremental, nb::object skip_experts,
                       nb::object num_tokens, const std::optional<std::string>& activation_dtype,
                       nb::object adapters) {
    const Deferring deferring{num_deferred, deferred_ids, deferred_output, copied_hidden_states,
                              copied_weights};
    new (self)
        PythonPass(std::move(layer), hidden_states, topk_ids, topk_weights, out, immediate_ids, chunk_size,
                   deferring, received, incremental, skip_experts, num_tokens, activation_dtype, adapters);
  };
  nb::class_<PythonPass>(m, "DeferredPass", kPassDoc, nb::type_slots(PythonPass::slots))
      .def("__init__", make, nb::arg("layer"), nb::arg("hidden_states"), nb::arg("topk_ids"),
           nb::arg("topk_weights"), nb::arg("out"), nb::arg("immediate_ids"), nb::kw_only(),
           nb::arg("chunk_size"), nb::arg("num_deferred") = 0, nb::arg("deferred_ids").none() = nb::none(),
           nb::arg("deferred_output").none() = nb::none(),
           nb::arg("copied_hidden_states").none() = nb::none(), nb::arg("copied_weights").none() = nb::none(),
           nb::arg("received").none() = nb::none(), nb::arg("incremental") = false,
           nb::arg("skip_experts").none() = nb::none(), nb::arg("num_tokens").none() = nb::none(),
           nb::arg("activation_dtype").none() = nb::none(), nb::arg("adapters").none() = nb::none())
      .def("check_ids", &PythonPass::check_ids, "Raise IndexError for a wrong id as it is now.")
      .def("immediate_tasks", &PythonPass::immediate_tasks,
           R"(Make the tasks that write `out`: one that splits the batch, and one for each chunk.

Raises, when they run
---------------------
IndexError
    An id of E or above, or a number of tokens outside 0 to T; nothing else is computed then.)")
      .def("deferred_tasks", &PythonPass::deferred_tasks,
           "Make the tasks that write `deferred_output`, to be run behind the others; none without one.")
      .def_prop_ro(
          "output", [](const PythonPass& self) { return self.output(); },
          "The DeferredOutput of the pass, None when no expert is deferred.")
      .def_prop_ro("is_joint", &PythonPass::is_joint,
                   "Whether the split has found that the immediate tasks compute both parts.");
}

}  // namespace ktmoe::bindings
