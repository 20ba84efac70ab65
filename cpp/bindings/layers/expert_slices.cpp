#include "bindings/layers/expert_slices.h"

#include <nanobind/stl/shared_ptr.h>

#include <deque>
#include <string>

#include "bindings/convert/forward_arrays.h"
#include "bindings/tasks/task.h"
#include "formats/registry.h"

namespace ktmoe::bindings {
namespace {

// An argument: an array a slice, each of so many rows of so many bytes.
struct Buffers {
  nb::handle source;
  const char* name;
  uint32_t num_rows;
  size_t row_bytes;
  std::byte* SliceArrays::* to;
};

// The arrays of gate and up, or of down, as they are given.
struct Given {
  nb::handle weights, scales, global_scales;
  const char *weights_name, *scales_name, *global_scales_name;
};

// The arrays of all arguments, checked, which stay alive with this.
class ExpertArrays {
 public:
  explicit ExpertArrays(size_t num_slices) : num_slices_(num_slices) {}

  std::vector<SliceArrays> read(const Given& given, const SliceShape& shape) {
    std::vector<SliceArrays> slices(num_slices_);
    add({given.weights, given.weights_name, shape.num_rows, shape.row_bytes, &SliceArrays::weights}, slices);
    // With separate block scales, the channel scales are the second kind.
    const bool separate = shape.num_scale_rows != 0, two_kinds = separate && shape.has_channel_scale;
    if (separate)
      add({given.scales, given.scales_name, shape.num_scale_rows, shape.scale_bytes, &SliceArrays::scales},
          slices);
    if (shape.has_channel_scale)
      add({two_kinds ? given.global_scales : given.scales,
           two_kinds ? given.global_scales_name : given.scales_name, shape.num_rows, sizeof(float),
           &SliceArrays::channel_scale},
          slices);
    if (!separate && !shape.has_channel_scale)
      refuse(given.scales, given.scales_name, shape, "no scales outside its rows");
    if (!two_kinds) refuse(given.global_scales, given.global_scales_name, shape, "no scales of two kinds");
    return slices;
  }

  const Arrays& all() const { return arrays_; }

 private:
  void add(const Buffers& buffers, std::vector<SliceArrays>& slices) {
    const auto expected = [&] {
      return str_cat(", expected a list or tuple of ", num_slices_, " array", num_slices_ == 1 ? "" : "s");
    };
    if (!nb::isinstance<nb::list>(buffers.source) && !nb::isinstance<nb::tuple>(buffers.source)) {
      const std::string type = nb::cast<std::string>(nb::handle(buffers.source.type()).attr("__name__"));
      throw nb::type_error(str_cat(buffers.name, ": got ", type, expected()).c_str());
    }
    if (nb::len(buffers.source) != num_slices_)
      throw_invalid(buffers.name, ": got ", nb::len(buffers.source), expected());
    for (size_t i = 0; i < num_slices_; ++i) {
      const nb::object item = buffers.source[i];
      const std::string& name = names_.emplace_back(str_cat(buffers.name, "[", i, "]"));
      const Array array = Array::write(item, name.c_str());
      array.expect_rows(buffers.num_rows, buffers.row_bytes).expect_contiguous();
      for (const Array& other : arrays_) array.expect_disjoint(other);
      slices[i].*buffers.to = array.as<std::byte>();
      arrays_.push_back(array);
    }
  }

  static void refuse(nb::handle source, const char* name, const SliceShape& shape, const char* why) {
    if (!source.is_none())
      throw_invalid(name, ": got some, expected None: ", format_name(shape.format), " has ", why);
  }

  const size_t num_slices_;
  std::deque<std::string> names_;  // which the arrays point to
  Arrays arrays_;
};

PythonTask write_expert_task(std::shared_ptr<MoE_Interface> layer, int64_t gpu_tp_count, int64_t expert_id,
                             nb::object w13_weights, nb::object w13_scales, nb::object w2_weights,
                             nb::object w2_scales, nb::object w13_global_scales,
                             nb::object w2_global_scales) {
  const GeneralMOEConfig& c = layer->config();
  ExpertSlices slices;
  slices.formats = layer->formats();
  const SliceShapes shapes = shapes_of_slices(c, slices.formats, gpu_tp_count);
  if (expert_id < 0 || expert_id >= c.expert_num)
    throw_out_of_range("expert_id: got expert ", expert_id, ", expected 0 to ", c.expert_num - 1);
  slices.expert = static_cast<uint32_t>(expert_id);
  auto arrays = std::make_shared<ExpertArrays>(static_cast<size_t>(gpu_tp_count));
  slices.w13 = arrays->read(
      {w13_weights, w13_scales, w13_global_scales, "w13_weights", "w13_scales", "w13_global_scales"},
      shapes.w13);
  slices.w2 = arrays->read(
      {w2_weights, w2_scales, w2_global_scales, "w2_weights", "w2_scales", "w2_global_scales"}, shapes.w2);
  return PythonTask([layer, arrays, slices = std::move(slices)] { layer->write_expert(slices); },
                    std::shared_ptr<const Arrays>(arrays, &arrays->all()));
}

}  // namespace

void bind_expert_slices(nb::class_<MoE_Interface>& layer) {
  const auto none = nb::none();
  layer.def("write_expert_task", &write_expert_task, nb::arg("gpu_tp_count"), nb::arg("expert_id"),
            nb::arg("w13_weights").none(), nb::arg("w13_scales").none(), nb::arg("w2_weights").none(),
            nb::arg("w2_scales").none(), nb::kw_only(), nb::arg("w13_global_scales").none() = none,
            nb::arg("w2_global_scales").none() = none,
            R"(Make the task that writes an expert to arrays, in slices of the intermediate size.

Parameters
----------
gpu_tp_count : int
    Slices, g: slice i has the outputs of gate and up, and the columns of down, from i I / g on.
expert_id : int
    Which expert.
w13_weights : list of arrays
    One array per slice, of any dtype, in C order: its rows of gate and then of up, in their encoding.
w13_scales : list of arrays, or None where the format has none outside the rows
    Likewise their block scales, or else the float32 channel scales.
w2_weights, w2_scales : list of arrays
    Likewise all rows of down, with the slice's columns.
w13_global_scales, w2_global_scales : list of arrays, optional
    The float32 channel scales, if the format has block scales too.

Returns
-------
Task)");
}

}  // namespace ktmoe::bindings
