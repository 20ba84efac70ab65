// Arrays that NumPy cannot import by itself (bfloat16 that DLPack exports), as Python can build a view of
// them.
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "bindings/convert/arrays.h"
#include "bindings/module.h"

namespace ktmoe::bindings {
namespace {

using Sizes = nb::typed<nb::tuple, nb::int_, nb::ellipsis>;
using Viewed = nb::typed<nb::tuple, nb::int_, nb::str, Sizes, Sizes, nb::object>;

Viewed host_array(nb::handle object, const std::string& name, bool writable) {
  const char* argument = name.c_str();
  const Array array = writable ? Array::write(object, argument) : Array::read(object, argument);
  nb::list shape, strides;
  for (size_t i = 0; i < array.ndim(); ++i) {
    shape.append(array.shape(i));
    strides.append(array.stride_bytes(i));
  }
  const auto address = reinterpret_cast<uint64_t>(array.as<void>());
  auto handle = std::make_unique<nb::ndarray<nb::ro>>(array.exported());
  const std::string dtype = dtype_name(handle->dtype());
  nb::capsule holder(handle.release(), [](void* p) noexcept { delete static_cast<nb::ndarray<nb::ro>*>(p); });
  return nb::make_tuple(address, dtype, nb::tuple(shape), nb::tuple(strides), holder);
}

}  // namespace

void bind_host_array(nb::module_& m) {
  m.def(
      "host_array", &host_array, nb::arg("array").none(), nb::arg("name"), nb::arg("writable"),
      R"(An array that another library than NumPy exports, in memory that the CPU can read, pinned memory too.

Raises
------
TypeError
    Not an array, or one on a device.
ValueError
    A read-only array where a writable one is required.

Returns
-------
address : int
dtype : str
shape : tuple of int
strides : tuple of int
    In bytes.
holder : object
    Holds the memory.)");
}

}  // namespace ktmoe::bindings
