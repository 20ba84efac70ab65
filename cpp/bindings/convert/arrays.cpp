#include "bindings/convert/arrays.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <functional>

#include "core/error.h"

namespace ktmoe::bindings {
namespace {

// What is looked up in every call. NumPy exports no dtype of ml_dtypes through a protocol (neither the buffer
// protocol nor DLPack), but views them as integers without a copy.
struct Names {
  nb::object dtype = nb::steal(PyUnicode_InternFromString("dtype"));
  nb::object view = nb::steal(PyUnicode_InternFromString("view"));
  nb::object uint16 = nb::module_::import_("numpy").attr("dtype")("uint16");
  nb::object bfloat16 =
      nb::module_::import_("numpy").attr("dtype")(nb::module_::import_("ml_dtypes").attr("bfloat16"));
  nb::object ndarray = nb::module_::import_("numpy").attr("ndarray");
};

Names* names = nullptr;  // lives to the end of the process: it must not be destroyed after the interpreter

bool is_numpy(nb::handle object) {
  return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(names->ndarray.ptr()));
}

bool is_bf16(nb::handle object) {
  const nb::object dtype = nb::steal(PyObject_GetAttr(object.ptr(), names->dtype.ptr()));
  return dtype.is(names->bfloat16) || dtype.equal(names->bfloat16);
}

// A NumPy array's view; invalid when it has none of that dtype.
nb::object viewed(nb::handle object, const nb::object& dtype) {
  nb::object view =
      nb::steal(PyObject_CallMethodObjArgs(object.ptr(), names->view.ptr(), dtype.ptr(), nullptr));
  if (!view.is_valid()) PyErr_Clear();
  return view;
}
nb::object as_integers(nb::handle object) {
  return viewed(object, nb::cast(str_cat("u", nb::cast<size_t>(nb::object(object.attr("itemsize"))))));
}

// A plain NumPy array: its own memory, even if a subclass exports something else.
nb::object as_plain(nb::handle object) {
  if (Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(names->ndarray.ptr()))
    return nb::borrow(object);
  return names->ndarray.attr("view")(object, names->ndarray);
}

// Whether the CPU can read the memory of a device: its own, and what is pinned or managed for a GPU.
bool is_on_host(int device_type) {
  return device_type == nb::device::cpu::value || device_type == nb::device::cuda_host::value ||
         device_type == nb::device::rocm_host::value || device_type == nb::device::cuda_managed::value;
}

DType dtype_of(const nb::dlpack::dtype& type) {
  using Code = nb::dlpack::dtype_code;
  if (type.lanes != 1) return DType::kOther;
  const auto code = static_cast<Code>(type.code);
  if (code == Code::Bfloat && type.bits == 16) return DType::kBf16;
  if (code == Code::Float && type.bits == 32) return DType::kFloat32;
  if (code == Code::Int && type.bits == 64) return DType::kInt64;
  if (code == Code::Int && type.bits == 32) return DType::kInt32;
  if (code == Code::UInt && type.bits == 8) return DType::kUint8;
  if (code == Code::Bool && type.bits == 8) return DType::kBool;
  return DType::kOther;
}

const char* label(DType dtype) {
  switch (dtype) {
    case DType::kBf16: return "bfloat16";
    case DType::kFloat32: return "float32";
    case DType::kInt64: return "int64";
    case DType::kInt32: return "int32";
    case DType::kUint8: return "uint8";
    case DType::kBool: return "bool";
    case DType::kOther: break;
  }
  return "another dtype";
}

template <class Items, class Text>
std::string bracketed(const Items& items, const Text& text) {
  std::string list = "[";
  for (const auto& item : items) list += (list.size() > 1 ? ", " : "") + text(item);
  return list + "]";
}

std::string text_of(const Dims& shape) {
  return bracketed(shape,
                   [](const Dim& d) { return d.letter ? std::string(d.letter) : std::to_string(d.value); });
}

[[noreturn]] void throw_no_array(nb::handle object, const char* name) {
  const std::string type = nb::cast<std::string>(nb::handle(object.type()).attr("__name__"));
  throw nb::type_error(
      str_cat(name, ": got ", type, ", expected an array on the CPU (NumPy, or with __dlpack__)").c_str());
}

}  // namespace

void init_arrays() { names = new Names; }

std::string dtype_name(const nb::dlpack::dtype& type) {
  using Code = nb::dlpack::dtype_code;
  switch (static_cast<Code>(type.code)) {
    case Code::Bfloat: return "bfloat" + std::to_string(type.bits);
    case Code::Float: return "float" + std::to_string(type.bits);
    case Code::Int: return "int" + std::to_string(type.bits);
    case Code::UInt: return "uint" + std::to_string(type.bits);
    case Code::Bool: return "bool";
    default: return "V" + std::to_string(type.bits / 8);
  }
}

int visit_arrays(const Arrays& arrays, visitproc visit, void* arg) {
  for (const Array& array : arrays) Py_VISIT(array.object().ptr());
  return 0;
}

// Fills the array when `object` is one that Handle takes.
template <class Handle>
bool Array::fill(nb::handle object, const char* name) {
  Handle handle;
  const auto is_taken = [&](const nb::object& exported) {
    return exported.is_valid() && nb::try_cast(exported, handle, false) && is_on_host(handle.device_type());
  };
  const bool is_of_numpy = is_numpy(object);
  const nb::object exporter = is_of_numpy ? as_plain(object) : nb::borrow(object);
  if (is_of_numpy && is_bf16(exporter)) {
    if (!is_taken(viewed(exporter, names->uint16))) return false;
    dtype_ = DType::kBf16;
  } else if (is_taken(exporter)) {
    dtype_ = dtype_of(handle.dtype());
  } else if (!is_of_numpy || !is_taken(as_integers(exporter))) {
    return false;
  }
  name_ = name;
  // A NumPy array keeps its own memory, and a reference to it is one that the cycle collector can follow.
  if (!is_of_numpy) handle_ = nb::ndarray<nb::ro>(handle);
  object_ = nb::borrow(object);
  data_ = const_cast<void*>(static_cast<const void*>(handle.data()));
  item_bytes_ = handle.dtype().bits / 8u;
  for (size_t i = 0; i < handle.ndim(); ++i) {
    shape_.push_back(static_cast<int64_t>(handle.shape(i)));
    strides_.push_back(handle.stride(i));
  }
  return true;
}

Array Array::read(nb::handle object, const char* name) {
  Array array;
  if (!array.fill<nb::ndarray<nb::ro>>(object, name)) throw_no_array(object, name);
  return array;
}

Array Array::write(nb::handle object, const char* name) {
  Array array;
  if (!array.fill<nb::ndarray<>>(object, name)) {
    const Array readable = read(object, name);  // throws when it is no array at all
    throw_invalid(name, ": got a read-only array ", readable.describe(),
                  ", expected one that can be written");
  }
  return array;
}

size_t Array::size() const {
  size_t size = 1;
  for (int64_t n : shape_) size *= static_cast<size_t>(n);
  return size;
}

std::string Array::dtype_name() const {
  if (dtype_ != DType::kOther) return label(dtype_);
  if (!nb::hasattr(object_, "dtype")) return "another dtype";
  const nb::object dtype = object_.attr("dtype");
  return nb::cast<std::string>(nb::str(nb::handle(dtype)));
}

std::string Array::describe() const {
  return dtype_name() + " " + bracketed(shape_, [](int64_t n) { return std::to_string(n); });
}

const Array& Array::expect(std::initializer_list<DType> dtypes, const Dims& shape) const {
  std::string wanted;
  bool dtype_fits = false;
  for (DType d : dtypes) {
    wanted += (wanted.empty() ? "" : " or ") + std::string(label(d));
    dtype_fits |= d == dtype_;
  }
  wanted += " " + text_of(shape);
  if (!dtype_fits) {
    const bool is_bits = dtype_name() == "uint16" && std::ranges::find(dtypes, DType::kBf16) != dtypes.end();
    const char* hint = is_bits ? "; bits of bfloat16 are given as array.view(ml_dtypes.bfloat16)" : "";
    throw nb::type_error(str_cat(name_, ": got ", describe(), ", expected ", wanted, hint).c_str());
  }

  bool shape_fits = shape.size() == shape_.size();
  for (size_t i = 0; shape_fits && i < shape.size(); ++i)
    shape_fits = shape[i].letter != nullptr || shape[i].value == shape_[i];
  if (!shape_fits) throw_invalid(name_, ": got ", describe(), ", expected ", wanted);
  return *this;
}

const Array& Array::expect_rows(int64_t num, size_t row_bytes) const {
  if (ndim() == 0 || shape(0) != num || bytes() != static_cast<size_t>(num) * row_bytes)
    throw_invalid(name_, ": got ", describe(), ", expected ", num, " rows of ", row_bytes, " bytes");
  return *this;
}

const Array& Array::expect_contiguous_rows() const {
  if (shape_.back() > 1 && strides_.back() != 1) {
    const auto in_bytes = [&](int64_t n) { return std::to_string(n * static_cast<int64_t>(item_bytes_)); };
    const std::string got = bracketed(strides_, in_bytes);
    throw nb::type_error(str_cat(name_, ": got strides ", got, ", expected a contiguous last axis").c_str());
  }
  return *this;
}

const Array& Array::expect_contiguous() const {
  int64_t step = 1;
  bool contiguous = true;
  for (size_t i = shape_.size(); i-- > 0;) {
    contiguous &= shape_[i] == 1 || strides_[i] == step;
    step *= shape_[i];
  }
  if (!contiguous && size() != 0)
    throw nb::type_error(
        str_cat(name_, ": got ", describe(), " with gaps or in another order, expected it C-contiguous")
            .c_str());
  return *this;
}

std::pair<const std::byte*, const std::byte*> Array::extent() const {
  const std::byte *first = as<std::byte>(), *behind = first + item_bytes_;
  for (size_t i = 0; i < shape_.size(); ++i)
    (strides_[i] < 0 ? first : behind) += (shape_[i] - 1) * stride_bytes(i);
  return {first, behind};
}

void Array::expect_disjoint(const Array& other) const {
  if (size() == 0 || other.size() == 0) return;
  const auto [a, behind_a] = extent();
  const auto [b, behind_b] = other.extent();
  const std::less<const std::byte*> before;
  if (before(a, behind_b) && before(b, behind_a))
    throw_invalid(name_, ": its memory overlaps that of ", other.name_, ", expected memory of its own");
}

}  // namespace ktmoe::bindings
