// The expert layers in Python: configs, and one class per method.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <set>
#include <utility>

#include "bindings/layers/expert_rows.h"
#include "bindings/layers/expert_slices.h"
#include "bindings/convert/forward_arrays.h"
#include "bindings/layers/pass_stats.h"
#include "bindings/module.h"
#include "bindings/tasks/task.h"
#include "formats/registry.h"
#include "moe/chunked_pass.h"
#include "moe/layer/tp_moe.h"

namespace ktmoe::bindings {
namespace {

using Layer = std::shared_ptr<MoE_Interface>;

// The matrices of a projection as Python gives them: arrays for all experts, or sequences of one each.
struct GivenProjection {
  nb::object codes, block_scales = nb::none(), channel_scale = nb::none();
  std::optional<std::string> format = {};

  bool is_none() const {
    return codes.is_none() && block_scales.is_none() && channel_scale.is_none() && !format;
  }
};

// Names of the parts of a projection in messages: the arguments of the wrappers of layers.
struct ProjectionNames {
  const char *codes, *scale, *format, *bias;
};
constexpr ProjectionNames kGateNames{"gate_proj", "gate_scale", "gate_format", "gate_bias"};
constexpr ProjectionNames kUpNames{"up_proj", "up_scale", "up_format", "up_bias"};
constexpr ProjectionNames kDownNames{"down_proj", "down_scale", "down_format", "down_bias"};

// A projection's weights as they are given, and how they must be.
struct Projection {
  GivenProjection given;
  ProjectionNames names;
  int64_t num, rows, columns;
  FormatId format;
};

// bf16 weights may be given as the arrays alone.
GivenProjection given_projection(nb::handle source) {
  if (nb::isinstance<GivenProjection>(source)) return nb::cast<GivenProjection>(source);
  return {nb::borrow(source)};
}

// Arrays of one dtype and shape, an expert each: from one array [E, ..] or a sequence of E arrays. Calls
// add(array, axis, data) for every expert, whose elements begin at `data` and whose axes at `axis`.
template <class Add>
void for_experts(nb::handle source, const char* name, int64_t num, DType dtype, const Dims& shape,
                 Arrays& owners, Add&& add) {
  if (nb::isinstance<nb::list>(source) || nb::isinstance<nb::tuple>(source)) {
    const size_t got = nb::len(source);
    if (got != static_cast<size_t>(num)) throw_invalid(name, ": got ", got, " arrays, expected ", num);
    for (int64_t e = 0; e < num; ++e) {
      const nb::object item = source[e];
      const Array& one = owners.emplace_back(Array::read(item, name)).expect({dtype}, shape);
      add(one, 0, one.as<const std::byte>());
    }
    return;
  }
  Dims stacked = {num};
  stacked.insert(stacked.end(), shape.begin(), shape.end());
  const Array& all = owners.emplace_back(Array::read(source, name)).expect({dtype}, stacked);
  for (int64_t e = 0; e < num; ++e) add(all, 1, all.as<const std::byte>() + e * all.stride_bytes(0));
}

// The E matrices [rows, bytes of a row] of a projection. Only the last axis has to be contiguous. bf16 is
// given as such, other formats as bytes.
std::vector<WeightView> matrices(const Projection& p, Arrays& owners) {
  const auto block = static_cast<int64_t>(format_block(p.format));
  if (p.columns % block != 0)
    throw_invalid(p.names.codes, ": got rows of ", p.columns, " values, expected a multiple of ", block,
                  ", a block of ", format_name(p.format));
  const bool is_bf16 = p.format == FormatId::kBf16;
  const int64_t width =
      is_bf16 ? p.columns : static_cast<int64_t>(format_row_bytes(p.format, static_cast<size_t>(p.columns)));
  std::vector<WeightView> views;
  const auto add = [&](const Array& a, size_t axis, const std::byte* data) {
    a.expect_contiguous_rows();
    WeightView view{data, static_cast<ptrdiff_t>(a.stride_bytes(axis)), static_cast<uint32_t>(p.columns)};
    view.format = p.format;
    views.push_back(view);
  };
  for_experts(p.given.codes, p.names.codes, p.num, is_bf16 ? DType::kBf16 : DType::kUint8, {p.rows, width},
              owners, add);
  return views;
}

// The channel scales of a projection, float32 [rows] an expert, of formats that have them.
void add_channel_scale(const Projection& p, Arrays& owners, std::vector<WeightView>& views) {
  if (!format_has_channel_scale(p.format)) {
    if (!p.given.channel_scale.is_none())
      throw_invalid(p.names.scale, ": got one, expected None: ", format_name(p.format),
                    " has no channel scales");
    return;
  }
  auto view = views.begin();
  for_experts(p.given.channel_scale, p.names.scale, p.num, DType::kFloat32, {p.rows}, owners,
              [&](const Array& a, size_t, const std::byte* data) {
                a.expect_contiguous();
                (view++)->channel_scale = reinterpret_cast<const float*>(data);
              });
}

// The block scales of a projection, where they are separate from the codes, uint8 [rows of scales, bytes of
// one] an expert.
void add_block_scales(const Projection& p, Arrays& owners, std::vector<WeightView>& views) {
  const int64_t serves = format_scale_rows(p.format);
  if (serves == 0) {
    if (!p.given.block_scales.is_none())
      throw_invalid(p.names.scale, ": got one, expected None: ", format_name(p.format),
                    " has no block scales");
    return;
  }
  const auto width = static_cast<int64_t>(format_scale_bytes(p.format, static_cast<size_t>(p.columns)));
  auto view = views.begin();
  for_experts(p.given.block_scales, p.names.scale, p.num, DType::kUint8,
              {(p.rows + serves - 1) / serves, width}, owners,
              [&](const Array& a, size_t axis, const std::byte* data) {
                a.expect_contiguous_rows();
                view->block_scales = data;
                (view++)->block_scales_stride_bytes = static_cast<ptrdiff_t>(a.stride_bytes(axis));
              });
}

std::vector<WeightView> scaled_matrices(const Projection& p, Arrays& owners) {
  std::vector<WeightView> views = matrices(p, owners);
  add_channel_scale(p, owners, views);
  add_block_scales(p, owners, views);
  return views;
}

std::vector<float> biases(nb::handle source, const char* name, int64_t num, int64_t width) {
  if (source.is_none()) return {};
  const Array a = Array::read(source, name);
  a.expect({DType::kFloat32, DType::kBf16}, {num, width}).expect_contiguous();
  return read_biases(a.as<void>(), float_type(a), a.size());
}

void apply_map(nb::handle source, const GeneralMOEConfig& c, ExpertWeights& weights) {
  if (source.is_none()) return;
  const Array a = Array::read(source, "physical_to_logical_map");
  a.expect({DType::kInt64}, {c.expert_num}).expect_contiguous();
  // A copy: the array's owner may write to it between the check and the use.
  weights.permute(std::vector<int64_t>(a.as<int64_t>(), a.as<int64_t>() + a.size()));
}

// Whether weights are plain numbers, bf16 or others.
bool format_is_numbers(FormatId id) {
  return id == FormatId::kBf16 || (format_is_blocks(id) && format_block(id) == 1);
}

// The format of a projection: that of the layer, or the given one where projections have their own. A layer
// of numbers takes them in any format of numbers.
FormatId projection_format(const GemmKernel& kernel, const std::optional<std::string>& given,
                           const char* name) {
  const bool takes_numbers = kernel.format && format_is_numbers(*kernel.format);
  if (kernel.format) {
    if (!given) return *kernel.format;
    if (!takes_numbers) throw_invalid(name, ": got '", *given, "', expected None: the layer has one format");
  }
  std::string known;
  for (size_t i = 0; i < kNumFormats; ++i) {
    const auto id = static_cast<FormatId>(i);
    if (!format_gguf_type(id) || (takes_numbers && !format_is_numbers(id))) continue;
    if (given && *given == format_name(id)) return id;
    known += str_cat(known.empty() ? "" : ", ", format_name(id));
  }
  throw_invalid(name, ": got ", given ? str_cat("'", *given, "'") : std::string("None"), ", expected one of ",
                known);
}

// Raises if anything of up is given although the activation is not gated.
void refuse_up(const GivenProjection& up, nb::handle bias) {
  if (up.is_none() && bias.is_none()) return;
  const char* name = !up.codes.is_none()                                         ? kUpNames.codes
                     : !up.channel_scale.is_none() || !up.block_scales.is_none() ? kUpNames.scale
                     : !bias.is_none()                                           ? kUpNames.bias
                                                                                 : kUpNames.format;
  throw_invalid(name, ": got one, expected None: the activation is not gated");
}

PythonTask load_weights_task(Layer layer, nb::object gate, nb::object up, nb::object down, nb::object map,
                             nb::object gate_bias, nb::object up_bias, nb::object down_bias) {
  const GeneralMOEConfig& c = layer->config();
  const int64_t num = c.expert_num, inter = c.intermediate_size, hidden = c.hidden_size;
  auto owners = std::make_shared<Arrays>();
  owners->reserve(9 * static_cast<size_t>(num));
  const auto read = [&](nb::handle source, const ProjectionNames& names, int64_t rows, int64_t columns) {
    GivenProjection given = given_projection(source);
    const FormatId format = projection_format(layer->kernel(), given.format, names.format);
    return scaled_matrices({std::move(given), names, num, rows, columns, format}, *owners);
  };
  auto weights = std::make_shared<ExpertWeights>();
  weights->matrices.gate = read(gate, kGateNames, inter, hidden);
  weights->biases.gate = biases(gate_bias, kGateNames.bias, num, inter);
  if (c.activation.gated) {
    weights->matrices.up = read(up, kUpNames, inter, hidden);
    weights->biases.up = biases(up_bias, kUpNames.bias, num, inter);
  } else {
    refuse_up(given_projection(up), up_bias);
  }
  weights->matrices.down = read(down, kDownNames, hidden, inter);
  weights->biases.down = biases(down_bias, kDownNames.bias, num, hidden);
  apply_map(map, c, *weights);
  weights->owner = owners;
  return PythonTask([layer, weights] { layer->load_weights(*weights); }, owners);
}

PythonTask forward_task(Layer layer, nb::object hidden_states, nb::object topk_ids, nb::object topk_weights,
                        nb::object out, bool incremental, nb::object base, nb::object skip_experts,
                        const std::optional<std::string>& activation_dtype) {
  ForwardArrays forward(layer->config(), hidden_states, topk_ids, topk_weights, out, skip_experts);
  forward.set_activation_dtype(activation_dtype_of(*layer, activation_dtype));
  if (incremental) forward.add_to_out();
  if (!base.is_none()) {
    if (incremental) throw_invalid("base: got one with incremental=True, expected one of the two");
    forward.add_to(base);
  }
  const auto arrays = forward.arrays();
  return PythonTask([layer, arrays, args = forward.args()] { layer->forward(args); }, arrays);
}

// One task per chunk of a batch. Each keeps the arrays alive on its own: the cycle collector counts
// references.
nb::typed<nb::list, PythonTask> forward_tasks(Layer layer, nb::object hidden_states, nb::object topk_ids,
                                              nb::object topk_weights, nb::object out, int64_t chunk_size,
                                              bool incremental, nb::object skip_experts,
                                              const std::optional<std::string>& activation_dtype,
                                              nb::object adapters) {
  if (chunk_size < 1 || chunk_size > UINT32_MAX)
    throw_invalid("chunk_size: got ", chunk_size, ", expected 1 to ", UINT32_MAX);
  ForwardArrays forward(layer->config(), hidden_states, topk_ids, topk_weights, out, skip_experts);
  forward.set_activation_dtype(activation_dtype_of(*layer, activation_dtype));
  if (incremental) forward.add_to_out();
  forward.set_adapters(adapters);
  const auto pass = std::make_shared<ChunkedPass>(layer, forward.args(), forward.args().topk_ids,
                                                  static_cast<uint32_t>(chunk_size));
  nb::typed<nb::list, PythonTask> tasks;
  for (size_t i = 0; i < pass->num_chunks(); ++i) {
    const auto arrays = std::make_shared<Arrays>(*forward.arrays());
    tasks.append(PythonTask([pass, arrays, i] { pass->compute(i); }, arrays));
  }
  return tasks;
}

kernels::ActivationKind activation_kind(const std::string& name) {
  std::set<std::string_view> known;
  for (const kernels::ActivationInfo& info : kernels::kActivations) {
    if (name == info.name) return info.kind;
    known.insert(info.name);
  }
  std::string names;
  for (std::string_view other : known) names += str_cat(names.empty() ? "" : ", ", other);
  throw_invalid("activation: got '", name, "', expected one of ", names);
}

// Parameters that are not given are those of the models that introduced the activation.
kernels::Activation make_activation(const std::string& name, bool gated, std::optional<float> limit,
                                    std::optional<float> alpha, std::optional<float> beta1,
                                    std::optional<float> beta2) {
  kernels::Activation a = kernels::default_activation(activation_kind(name), gated);
  a.limit = limit.value_or(a.limit), a.alpha = alpha.value_or(a.alpha);
  a.beta1 = beta1.value_or(a.beta1), a.beta2 = beta2.value_or(a.beta2);
  return a;
}

std::optional<std::string> name_of(ActivationDtype dtype) {
  switch (dtype) {
    case ActivationDtype::kDefault: break;
    case ActivationDtype::kBf16: return "bfloat16";
    case ActivationDtype::kInt8: return "int8";
  }
  return std::nullopt;
}

void bind_config(nb::module_& m) {
  nb::class_<GeneralMOEConfig>(m, "MOEConfig", R"(The shape of an expert layer.

Parameters
----------
expert_num, num_experts_per_tok, hidden_size, intermediate_size : int
    E, P, H and I.
layer_idx : int
    Which layer of the model this is.
pool : WorkerPool, optional
    The threads to run on: the `backend_` of a CPUInfer. Needed before a layer is made.

Attributes
----------
group_size : int
    For weights that are quantized by groups; 0 for the default of the class.
scale_inputs : bool
    The routing weights scale the inputs of the experts, rounded to bfloat16, not their outputs.
activation_dtype : {"bfloat16", "int8"} or None
    What products with encoded weights take activations in; None for the method's own.)")
      .def(
          "__init__",
          [](GeneralMOEConfig* self, int64_t experts, int64_t per_token, int64_t hidden, int64_t intermediate,
             int64_t layer_idx, std::shared_ptr<WorkerPool> pool) {
            new (self)
                GeneralMOEConfig{experts, per_token, hidden, intermediate, layer_idx, {}, std::move(pool)};
          },
          nb::arg("expert_num") = 0, nb::arg("num_experts_per_tok") = 0, nb::arg("hidden_size") = 0,
          nb::arg("intermediate_size") = 0, nb::arg("layer_idx") = 0, nb::arg("pool").none() = nb::none())
      .def_rw("expert_num", &GeneralMOEConfig::expert_num)
      .def_rw("num_experts_per_tok", &GeneralMOEConfig::num_experts_per_tok)
      .def_rw("hidden_size", &GeneralMOEConfig::hidden_size)
      .def_rw("intermediate_size", &GeneralMOEConfig::intermediate_size)
      .def_rw("layer_idx", &GeneralMOEConfig::layer_idx)
      .def_rw("group_size", &GeneralMOEConfig::group_size)
      .def_rw("scale_inputs", &GeneralMOEConfig::scale_inputs)
      .def_prop_rw(
          "activation_dtype", [](const GeneralMOEConfig& self) { return name_of(self.activation_dtype); },
          [](GeneralMOEConfig& self, const std::optional<std::string>& name) {
            self.activation_dtype = activation_dtype_of(name);
          },
          nb::arg().none())
      .def_rw("pool", &GeneralMOEConfig::pool, nb::arg().none())
      .def(
          "set_activation",
          [](GeneralMOEConfig& self, const std::string& kind, bool gated, std::optional<float> limit,
             std::optional<float> alpha, std::optional<float> beta1, std::optional<float> beta2) {
            self.activation = make_activation(kind, gated, limit, alpha, beta1, beta2);
          },
          nb::arg("kind"), nb::arg("gated") = true, nb::arg("limit").none() = nb::none(),
          nb::arg("alpha").none() = nb::none(), nb::arg("beta1").none() = nb::none(),
          nb::arg("beta2").none() = nb::none(),
          "Set the activation function by name; the reference states the formulas.");
}

void bind_projection(nb::module_& m) {
  const auto none = nb::none();
  nb::class_<GivenProjection>(m, "Projection", R"(The matrices of a projection, [N, K] for each of E experts.

Parameters
----------
codes : array or sequence of arrays
    bfloat16 [E, N, K], or E arrays [N, K]. Of other formats uint8 [E, N, B], or E arrays [N, B], B the bytes of
    a row (`FormatInfo.row_bytes`).
block_scales : array or sequence of arrays, optional
    uint8 [E, S, B], or E arrays [S, B]: S rows of B bytes of scales, where the format keeps them separate from the codes.
channel_scale : array or sequence of arrays, optional
    float32 [E, N], or E arrays [N], where the format has them.
format : str, optional
    Of a layer whose projections each have a format: its name, "q4_k" for example. Of a layer of numbers "f32" or
    "f16", where they are not bfloat16.)")
      .def(
          "__init__",
          [](GivenProjection* self, nb::object codes, nb::object block_scales, nb::object channel_scale,
             std::optional<std::string> format) {
            new (self) GivenProjection{std::move(codes), std::move(block_scales), std::move(channel_scale),
                                       std::move(format)};
          },
          nb::arg("codes").none(), nb::kw_only(), nb::arg("block_scales").none() = none,
          nb::arg("channel_scale").none() = none, nb::arg("format").none() = none);
}

void bind_load(nb::class_<MoE_Interface>& layer) {
  const auto none = nb::none();
  layer.def_prop_ro("loaded", &MoE_Interface::loaded)
      .def(
          "check_activation_dtype",
          [](const MoE_Interface& self, const std::optional<std::string>& name) {
            activation_dtype_of(self, name);
          },
          nb::arg("activation_dtype").none(), "Raise ValueError for one that the products cannot have.")
      .def("load_weights_task", &load_weights_task, nb::arg("gate_proj").none(), nb::arg("up_proj").none(),
           nb::arg("down_proj").none(), nb::arg("physical_to_logical_map").none() = none, nb::kw_only(),
           nb::arg("gate_bias").none() = none, nb::arg("up_bias").none() = none,
           nb::arg("down_bias").none() = none,
           R"(Make the task that gives the layer its weights. They are referred to, not copied.

Parameters
----------
gate_proj, up_proj : Projection, array or sequence of arrays
    [N, K] is [I, H]. The codes alone where there are no scales. up_proj is None when the activation is not
    gated.
down_proj : Projection, array or sequence of arrays
    [N, K] is [H, I].
physical_to_logical_map : array, optional
    int64 [E]: expert i uses the weights of map[i].
gate_bias, up_bias, down_bias : array, optional
    float32 or bfloat16 [E, I], [E, I], [E, H].

Returns
-------
Task)");
}

void bind_forward(nb::class_<MoE_Interface>& layer) {
  layer
      .def("forward_task", &forward_task, nb::arg("hidden_states").none(), nb::arg("topk_ids").none(),
           nb::arg("topk_weights").none(), nb::arg("out").none(), nb::arg("incremental") = false,
           nb::kw_only(), nb::arg("base").none() = nb::none(), nb::arg("skip_experts").none() = nb::none(),
           nb::arg("activation_dtype").none() = nb::none(),
           R"(Make the task of one forward pass.

Parameters
----------
hidden_states : array
    bfloat16 [T, H].
topk_ids : array
    int64 [T, P]; negative ids are skipped.
topk_weights : array
    float32 [T, P].
out : array
    bfloat16 or float32 [T, H], written.
incremental : bool
    Add to the contents of `out`.
base : array, optional
    bfloat16 or float32 [T, H], added to the result.
skip_experts : array, optional
    bool [E]: experts that are left out.
activation_dtype : {"bfloat16", "int8"}, optional
    What products take activations in; None for the config's.

Returns
-------
Task)")
      .def("forward_tasks", &forward_tasks, nb::arg("hidden_states").none(), nb::arg("topk_ids").none(),
           nb::arg("topk_weights").none(), nb::arg("out").none(), nb::arg("chunk_size"),
           nb::arg("incremental") = false, nb::kw_only(), nb::arg("skip_experts").none() = nb::none(),
           nb::arg("activation_dtype").none() = nb::none(), nb::arg("adapters").none() = nb::none(),
           R"(Make the tasks of one forward pass in chunks, to be run one after the other.

Scratch memory is that of one chunk. A wrong id in any chunk is an error of the first task, and of all others.

Parameters
----------
hidden_states, topk_ids, topk_weights, out, incremental, skip_experts, activation_dtype
    See `forward_task`.
chunk_size : int
    Tokens of a chunk, at most.
adapters : array of int32 [T], optional
    The number of each token's adapter, negative for none; see `MoE_SFT_Interface.set_adapter_task`.

Returns
-------
list of Task
    At least one.

Raises
------
TypeError, ValueError
    An argument of another kind, dtype, order or shape, or a chunk size below 1.)");
}

void bind_interface(nb::module_& m) {
  nb::class_<MoE_Interface> layer(m, "MoE_Interface", "What every layer of experts does.");
  bind_load(layer);
  bind_forward(layer);
  bind_stats(layer);
  bind_expert_rows(layer);
  bind_expert_slices(layer);
}

// One class per method.
template <size_t kIndex>
struct InferenceLayer final : TP_MOE {
  explicit InferenceLayer(const GeneralMOEConfig& config)
      : TP_MOE(config, gemm_kernel(kMethods[kIndex], config)) {}
};

template <size_t... kIndices>
void bind_inference_layers(nb::module_& m, std::index_sequence<kIndices...>) {
  (nb::class_<InferenceLayer<kIndices>, MoE_Interface>(m, kMethods[kIndices].inference_class,
                                                       kMethods[kIndices].inference_text)
       .def(nb::init<GeneralMOEConfig>(), nb::arg("config")),
   ...);
}

}  // namespace

void bind_moe(nb::module_& m) {
  bind_config(m);
  bind_projection(m);
  bind_pass_stats(m);
  bind_interface(m);
  bind_inference_layers(m, std::make_index_sequence<kMethods.size()>());
}

}  // namespace ktmoe::bindings
