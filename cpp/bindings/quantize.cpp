// Quantizing weights in Python: the task that turns rows into codes and scales.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <utility>

#include "bindings/convert/arrays.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "core/error.h"
#include "moe/weights/quantize.h"

namespace ktmoe::bindings {
namespace {

FormatId format_from_name(const std::string& name) {
  std::string known;
  for (FormatId format : kQuantizedFormats) {
    if (name == format_name(format)) return format;
    known += (known.empty() ? "" : ", ") + std::string(format_name(format));
  }
  throw_invalid("format: got '", name, "', expected one of ", known);
}

size_t row_bytes(const std::string& format, int64_t k) {
  const FormatId parsed = format_from_name(format);
  if (k < 0 || k > INT32_MAX) throw_invalid("k: got ", k, ", expected 0 to ", INT32_MAX);
  return format_row_bytes(parsed, static_cast<size_t>(k));
}

// The arrays of one call. They stay alive as long as this does.
struct QuantizeArrays {
  Array weights, codes, channel_scale;
  kernels::QuantizeArgs args;

  void take_weights(nb::handle source) {
    weights = Array::read(source, "weights");
    weights.expect({DType::kBf16, DType::kFloat32}, {"N", "K"});
    const int64_t n = weights.shape(0), k = weights.shape(1),
                  item = static_cast<int64_t>(weights.item_bytes());
    if (n > 0) weights.expect_contiguous_rows();
    if (n > INT32_MAX || k > INT32_MAX)
      throw_invalid("weights: got [", n, ", ", k, "], expected at most ", INT32_MAX, " rows and columns");
    args.rows = weights.as<void>();
    args.type = weights.dtype() == DType::kBf16 ? kernels::FloatType::kBf16 : kernels::FloatType::kFloat32;
    args.stride = weights.stride_bytes(0) / item;
    args.n = static_cast<uint32_t>(n), args.k = static_cast<uint32_t>(k);
  }

  void take_codes(nb::handle target, FormatId format) {
    codes = Array::write(target, "codes");
    args.codes_stride = format_row_bytes(format, args.k);
    codes.expect({DType::kUint8}, {args.n, static_cast<int64_t>(args.codes_stride)}).expect_contiguous();
    codes.expect_disjoint(weights);
    args.codes = codes.as<std::byte>();
  }

  void take_channel_scale(nb::handle target, FormatId format, const std::string& name) {
    if (target.is_none()) {
      if (format_has_channel_scale(format))
        throw_invalid("channel_scale: got None, expected float32 [", args.n, "] for ", name);
      return;
    }
    if (!format_has_channel_scale(format))
      throw_invalid("channel_scale: got one, expected None: rows of ", name, " contain their scales");
    channel_scale = Array::write(target, "channel_scale");
    channel_scale.expect({DType::kFloat32}, {args.n}).expect_contiguous();
    channel_scale.expect_disjoint(weights);
    channel_scale.expect_disjoint(codes);
    args.channel_scale = channel_scale.as<float>();
  }
};

PythonTask quantize_task(const std::string& format, nb::object weights, nb::object codes,
                         nb::object channel_scale, std::shared_ptr<WorkerPool> pool) {
  const FormatId parsed = format_from_name(format);
  QuantizeArrays arrays;
  arrays.take_weights(weights);
  arrays.take_codes(codes, parsed);
  arrays.take_channel_scale(channel_scale, parsed, format);
  const auto kept = std::make_shared<Arrays>(Arrays{arrays.weights, arrays.codes, arrays.channel_scale});
  return PythonTask(
      [parsed, args = arrays.args, kept, pool = std::move(pool)] {
        try {
          quantize_rows(parsed, args, *pool);
        } catch (const std::invalid_argument& error) {
          throw_invalid(kept->front().name(), ": ", error.what());
        }
      },
      kept);
}

void bind_row_bytes(nb::module_& m) {
  m.def("quantized_row_bytes", &row_bytes, nb::arg("format"), nb::arg("k"),
        R"(Count the bytes of a row of quantized weights.

Parameters
----------
format : str
    As `quantize_task` takes it.
k : int
    The number of weights.

Returns
-------
int

Raises
------
ValueError
    An unknown format, a negative number of weights.

Examples
--------
>>> from ktmoe_np import kt_kernel_ext as ext
>>> ext.quantized_row_bytes("int4_group32", 2048)
1088)");
}

void bind_task(nb::module_& m) {
  m.def("quantize_task", &quantize_task, nb::arg("format"), nb::arg("weights").none(),
        nb::arg("codes").none(), nb::arg("channel_scale").none() = nb::none(), nb::kw_only(), nb::arg("pool"),
        R"(Make the task that quantizes the rows of a matrix.

It computes `quantize_int8` or `quantize_int4` of `ktmoe_np.reference` and writes the bytes of `pack_int8` or
`pack_int4`: the same bytes on every instruction set, with any number of threads.

Parameters
----------
format : str
    The contents of a row of `codes`::

        int8           K codes
        int8_group32   K codes, the float32 scales of groups of 32
        int4_group32   K codes, two per byte, the int8 multipliers of groups of 32
        int4_group64   the same with groups of 64
        int4_group128  the same with groups of 128

weights : array
    bfloat16 or float32 [N, K]. Rows may be strided, the last axis is contiguous.
codes : array
    uint8 [N, quantized_row_bytes(format, K)], C-contiguous, written.
channel_scale : array, optional
    float32 [N], written. Left out for int8_group32, needed for the others.
pool : WorkerPool
    The threads to run on: the `backend_` of a CPUInfer.

Returns
-------
Task
    It raises ValueError for the first row with NaN or infinity. That row is not written, others may be.

Raises
------
ValueError
    An unknown format; a shape that does not fit; a `channel_scale` missing or too many; an array that is
    read-only or overlaps another.
TypeError
    Not an array; another dtype; gaps where there may be none.

Examples
--------
>>> import numpy as np
>>> from ktmoe_np import kt_kernel_ext as ext
>>> engine = ext.CPUInfer(1)
>>> codes, channel_scale = np.empty((1, 3), np.uint8), np.empty(1, np.float32)
>>> weights = np.float32([[2.54, -1.0, 0.01]])
>>> engine.run(ext.quantize_task("int8", weights, codes, channel_scale, pool=engine.backend_))
>>> codes.view(np.int8), channel_scale
(array([[127, -50,   0]], dtype=int8), array([0.02], dtype=float32)))");
}

}  // namespace

void bind_quantize(nb::module_& m) {
  bind_row_bytes(m);
  bind_task(m);
}

}  // namespace ktmoe::bindings
