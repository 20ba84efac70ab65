// Rows of experts that are summed apart from their layer, in Python.
#include "bindings/layers/expert_rows.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <utility>
#include <vector>

#include "bindings/convert/forward_arrays.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "core/error.h"
#include "moe/combine_rows.h"

namespace ktmoe::bindings {
namespace {

PythonTask expert_rows_task(std::shared_ptr<MoE_Interface> layer, nb::object hidden_states,
                            nb::object topk_ids, nb::object topk_weights, nb::object rows,
                            const std::optional<std::string>& activation_dtype) {
  ForwardArrays forward(layer->config(), hidden_states, topk_ids, topk_weights, rows, nb::none(),
                        Output::kExpertRows);
  forward.set_activation_dtype(activation_dtype_of(*layer, activation_dtype));
  const auto arrays = forward.arrays();
  return PythonTask([layer, arrays, args = forward.args()] { layer->forward(args); }, arrays);
}

PythonTask combine_rows_task(std::shared_ptr<WorkerPool> pool, nb::handle rows, nb::handle row,
                             nb::handle weights, nb::handle hidden_states, nb::handle out) {
  auto owners = std::make_shared<Arrays>();
  owners->reserve(4);
  const Array& y = owners->emplace_back(Array::read(rows, "rows"));
  y.expect({DType::kFloat32}, {"S", "H"}).expect_contiguous();
  const Array index = Array::read(row, "row");
  index.expect({DType::kInt32}, {"T", "P"}).expect_contiguous();
  const int64_t tokens = index.shape(0), slots = index.shape(1), hidden = y.shape(1);
  const Array& x = owners->emplace_back(Array::read(hidden_states, "hidden_states"));
  x.expect({DType::kBf16}, {tokens, hidden}).expect_contiguous();
  const Array& result = owners->emplace_back(Array::write(out, "out"));
  result.expect({DType::kBf16, DType::kFloat32}, {tokens, hidden}).expect_contiguous();
  for (const Array* other : {&y, &x}) result.expect_disjoint(*other);
  if (tokens > INT32_MAX || hidden > INT32_MAX || slots > INT32_MAX)
    throw_invalid("row: got ", tokens, " x ", slots, " slots of ", hidden, ", expected fewer in one call");

  RowSums sums;
  sums.num_tokens = static_cast<uint32_t>(tokens), sums.slots = static_cast<uint32_t>(slots);
  sums.hidden_size = static_cast<uint32_t>(hidden);
  sums.rows = y.as<float>(), sums.hidden_states = x.as<bf16>();
  sums.out = result.as<void>(), sums.out_type = float_type(result);
  if (!weights.is_none()) {
    const Array& w = owners->emplace_back(Array::read(weights, "weights"));
    w.expect({DType::kFloat32}, {tokens, slots}).expect_contiguous();
    result.expect_disjoint(w);
    sums.weights = w.as<float>();
  }
  // A copy is what is checked and used: the owner may write to the array meanwhile.
  std::vector<int32_t> checked(index.as<int32_t>(), index.as<int32_t>() + index.size());
  for (size_t i = 0; i < checked.size(); ++i)
    if (checked[i] >= y.shape(0))
      throw_out_of_range("row: got ", checked[i], " at ", i, ", expected below ", y.shape(0),
                         ", the number of rows");
  return PythonTask(
      [pool = std::move(pool), sums, checked = std::move(checked), owners]() mutable {
        sums.row = checked.data();
        combine_rows(sums, *pool);
      },
      owners);
}

}  // namespace

void bind_expert_rows(nb::class_<MoE_Interface>& layer) {
  layer.def("expert_rows_task", &expert_rows_task, nb::arg("hidden_states").none(),
            nb::arg("topk_ids").none(), nb::arg("topk_weights").none(), nb::arg("rows").none(), nb::kw_only(),
            nb::arg("activation_dtype").none() = nb::none(),
            R"(Make the task of one forward pass that does not sum what experts compute.

`combine_rows_task` sums the rows, here or on another host, to the bits that `forward_task` gives.

Parameters
----------
hidden_states, topk_ids, topk_weights, activation_dtype
    See `forward_task`. Weights count only where they scale the inputs.
rows : array
    float32 [S, H], written: the result of the expert of each slot that is not skipped, in the order of slots, all of
    a token before those of the next.

Returns
-------
Task
    Raises ValueError when it runs if S is another number.)");
}

void bind_combine_rows(nb::module_& m) {
  m.def("combine_rows_task", &combine_rows_task, nb::arg("pool"), nb::arg("rows").none(),
        nb::arg("row").none(), nb::arg("weights").none(), nb::arg("hidden_states").none(),
        nb::arg("out").none(),
        R"(Make the task that sums rows of experts that were computed elsewhere, as a layer does.

out[t] = sum over p in slot order of weights[t, p] * rows[row[t, p]], rounded once.

Parameters
----------
pool : WorkerPool
    The `backend_` of the engine that the task is given to.
rows : array
    float32 [S, H], what experts give before routing weights are applied.
row : array
    int32 [T, P]: the row of each slot; slots with a negative number are left out. Copied.
weights : array or None
    float32 [T, P]; None for ones.
hidden_states : array
    bfloat16 [T, H], the inputs: a token that is not finite gets NaN.
out : array
    bfloat16 or float32 [T, H], written.

Returns
-------
Task

Raises
------
TypeError, ValueError
    An argument of another kind, dtype, order or shape.
IndexError
    A row that is not there.)");
}

}  // namespace ktmoe::bindings
