// The registry in Python: which formats, activations and methods there are.
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bindings/module.h"
#include "core/error.h"
#include "formats/registry.h"
#include "kernels/activations.h"
#include "moe/methods.h"

namespace ktmoe::bindings {
namespace {

struct FormatInfo {
  FormatId id;

  // A row of k values, of which the bytes are counted by `bytes`.
  template <class Bytes>
  size_t count(int64_t k, Bytes&& bytes) const {
    if (k < 0 || k > INT32_MAX) throw_invalid("k: got ", k, ", expected 0 to ", INT32_MAX);
    return bytes(id, static_cast<size_t>(k));
  }
};

struct ActivationRecord {
  std::string name, config_key;
  bool gated, ungated;
  std::map<std::string, float> parameters;
};

struct MethodInfo {
  std::string mode;
  std::vector<std::string> names;
  std::string layer, weights, product;
  std::vector<FormatInfo> formats;
  std::vector<std::string> codes, scales;
};

std::vector<FormatInfo> formats() {
  std::vector<FormatInfo> all;
  for (size_t i = 0; i < kNumFormats; ++i) all.push_back({static_cast<FormatId>(i)});
  return all;
}

std::vector<ActivationRecord> activations() {
  std::vector<ActivationRecord> all;
  for (const kernels::ActivationInfo& info : kernels::kActivations) {
    ActivationRecord record{
        std::string(info.name), std::string(info.config_key), info.has_gated(), info.has_ungated(), {}};
    const auto add = [&](const char* name, const std::optional<float>& value) {
      if (value) record.parameters[name] = *value;
    };
    add("limit", info.parameters.limit), add("alpha", info.parameters.alpha);
    add("beta1", info.parameters.beta1), add("beta2", info.parameters.beta2);
    all.push_back(std::move(record));
  }
  return all;
}

std::vector<std::string> words(std::string_view text) {
  std::vector<std::string> found;
  while (!text.empty()) {
    const size_t end = text.find(' ');
    found.emplace_back(text.substr(0, end));
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  }
  return found;
}

const char* source_name(WeightSource source) {
  switch (source) {
    case WeightSource::kNative: return "native";
    case WeightSource::kQuantized: return "quantized";
    case WeightSource::kGguf: return "gguf";
  }
  return "";
}

MethodInfo method_info(const Method& method, bool trains) {
  MethodInfo info;
  info.mode = trains ? "sft" : "inference";
  info.names.push_back(std::string(method.name) + (trains ? "_SFT" : ""));
  if (trains && !method.family.empty())
    info.names.insert(info.names.begin(), std::string(method.family) + "_SFT");
  info.layer = trains ? method.training_class : method.inference_class;
  info.weights = source_name(method.weights);
  info.product = method.product == ProductType::kInt8 ? "int8" : "bfloat16";
  for (FormatId id : method.formats()) info.formats.push_back({id});
  info.codes = words(method.codes), info.scales = words(method.scales);
  return info;
}

std::vector<MethodInfo> methods() {
  std::vector<MethodInfo> all;
  for (const bool trains : {false, true})
    for (const Method& method : kMethods) all.push_back(method_info(method, trains));
  return all;
}

void bind_format_info(nb::module_& m) {
  nb::class_<FormatInfo>(m, "FormatInfo", R"(How a format encodes the rows of a weight matrix.

Attributes
----------
name : str
    GGUF types have their own names, which another format may have too.
gguf_type : int or None
    The number of a GGUF tensor type.
block : int
    A row is a multiple of so many values.
group : int or None
    Values of a row that share a scale; None for formats without scales or with one per row.
scale_rows : int
    Rows that share a row of block scales, where these are separate from the codes; else 0.
has_channel_scale : bool
    Whether every row has its own float32 scale, separate from the codes.
is_integer : bool
    Whether integer products take the codes.
activation_block : int
    int8 activations that share a scale in products with this format; 0 where these do not exist.)")
      .def_prop_ro("name", [](const FormatInfo& f) { return std::string(format_name(f.id)); })
      .def_prop_ro("gguf_type", [](const FormatInfo& f) { return format_gguf_type(f.id); })
      .def_prop_ro("block", [](const FormatInfo& f) { return format_block(f.id); })
      .def_prop_ro("group", [](const FormatInfo& f) { return format_group(f.id); })
      .def_prop_ro("scale_rows", [](const FormatInfo& f) { return format_scale_rows(f.id); })
      .def_prop_ro("has_channel_scale", [](const FormatInfo& f) { return format_has_channel_scale(f.id); })
      .def_prop_ro("is_integer", [](const FormatInfo& f) { return format_is_integer(f.id); })
      .def_prop_ro("activation_block", [](const FormatInfo& f) { return format_activation_block(f.id); })
      .def(
          "row_bytes", [](const FormatInfo& f, int64_t k) { return f.count(k, format_row_bytes); },
          nb::arg("k"), "Count the bytes of a row of k values, including the scales in it.")
      .def(
          "code_bytes", [](const FormatInfo& f, int64_t k) { return f.count(k, format_code_bytes); },
          nb::arg("k"), "Count the bytes of codes of a row in which the scales follow the codes.")
      .def(
          "scale_bytes", [](const FormatInfo& f, int64_t k) { return f.count(k, format_scale_bytes); },
          nb::arg("k"), "Count the bytes of a row of block scales that are separate from the codes.")
      .def("__repr__", [](const FormatInfo& f) { return str_cat("<format ", format_name(f.id), ">"); });
}

void bind_activation_info(nb::module_& m) {
  nb::class_<ActivationRecord>(m, "ActivationInfo", R"(An activation function of experts.

Attributes
----------
name : str
gated, ungated : bool
    The forms it has: with a gate and an up projection, with one projection.
parameters : dict of str to float
    The parameters of the gated form, with the values of the models that introduced it.
config_key : str
    The key of a Hugging Face config.json that makes "silu" this function; empty for none.)")
      .def_ro("name", &ActivationRecord::name)
      .def_ro("gated", &ActivationRecord::gated)
      .def_ro("ungated", &ActivationRecord::ungated)
      .def_ro("parameters", &ActivationRecord::parameters)
      .def_ro("config_key", &ActivationRecord::config_key)
      .def("__repr__", [](const ActivationRecord& a) { return str_cat("<activation ", a.name, ">"); });
}

void bind_method_info(nb::module_& m) {
  nb::class_<MethodInfo>(m, "MethodInfo", R"(How the experts of a layer are encoded and multiplied.

Attributes
----------
mode : str
    "inference" or "sft".
names : list of str
    The first is the main one.
layer : str
    The class in `kt_kernel_ext.moe`.
weights : str
    "native": in the encoding of the checkpoint; "quantized": quantized at load; "gguf": each projection in a
    GGUF tensor type.
product : str
    The operands of the main products: "bfloat16" or "int8".
formats : list of FormatInfo
    The first is the default; where there are several, the group size chooses among them.
codes, scales : list of str
    NumPy dtypes of arrays of native weights, the usual one first.)")
      .def_ro("mode", &MethodInfo::mode)
      .def_ro("names", &MethodInfo::names)
      .def_ro("layer", &MethodInfo::layer)
      .def_ro("weights", &MethodInfo::weights)
      .def_ro("product", &MethodInfo::product)
      .def_ro("formats", &MethodInfo::formats)
      .def_ro("codes", &MethodInfo::codes)
      .def_ro("scales", &MethodInfo::scales)
      .def("__repr__", [](const MethodInfo& i) { return str_cat("<method ", i.names.front(), ">"); });
}

}  // namespace

void bind_registry(nb::module_& m) {
  bind_format_info(m);
  bind_activation_info(m);
  bind_method_info(m);
  m.def("formats", &formats, "List the weight formats that the engine computes from.");
  m.def("activations", &activations, "List the activation functions; the first is the default.");
  m.def("methods", &methods, "List the methods of both modes; the first of a mode is its default.");
}

}  // namespace ktmoe::bindings
