// CUDA in Python: whether there is a driver, how streams wait, arrays of devices, pages that are locked.
#include <nanobind/stl/string.h>

#include <memory>
#include <string>
#include <utility>

#include "bindings/convert/arrays.h"
#include "bindings/tasks/gil.h"
#include "bindings/module.h"
#include "bindings/streams/stream_session.h"

namespace ktmoe::bindings {

namespace {

void wait(uint64_t waiting, uint64_t stream) {
  const GilRelease no_gil;
  CudaDriver::get().wait(as_stream(waiting), as_stream(stream));
}

using Exported =
    nb::typed<nb::tuple, nb::int_, nb::str, nb::typed<nb::tuple, nb::int_, nb::ellipsis>, bool, nb::object>;

Exported exported_array(nb::capsule capsule) {
  auto array = std::make_unique<nb::ndarray<nb::ro>>();
  if (!nb::try_cast(capsule, *array, false))
    throw nb::type_error("capsule: got another, expected one of DLPack");
  nb::list shape;
  bool is_contiguous = true;
  int64_t step = 1;
  for (size_t i = array->ndim(); i-- > 0; step *= static_cast<int64_t>(array->shape(i)))
    is_contiguous = is_contiguous && (array->shape(i) == 1 || array->stride(i) == step);
  for (size_t i = 0; i < array->ndim(); ++i) shape.append(array->shape(i));
  const auto address = reinterpret_cast<uint64_t>(array->data());
  const std::string name = dtype_name(array->dtype());
  nb::capsule holder(array.release(), [](void* p) noexcept { delete static_cast<nb::ndarray<nb::ro>*>(p); });
  return nb::make_tuple(address, name, nb::tuple(shape), is_contiguous, holder);
}

void lock_pages(nb::handle array) {
  const Array host = Array::write(array, "array");
  host.expect_contiguous();
  const GilRelease no_gil;
  CudaDriver::get().lock_pages(host.as<void>(), host.bytes());
}

void unlock_pages(uint64_t address) {
  const GilRelease no_gil;  // the driver waits for all that its streams are doing
  if (CudaDriver::is_there()) CudaDriver::get().unlock_pages(reinterpret_cast<void*>(address));
}

}  // namespace

void bind_cuda(nb::module_& m) {
  bind_stream_pass(m);
  m.def("is_available", &CudaDriver::is_there, "Whether a driver and a GPU are present.");
  m.def(
      "raise_error", [] { StreamSession::of_process().rethrow(); },
      "Raise the first exception since the last call, of tasks in streams and of JAX programs on a GPU.");
  m.def(
      "stream_key",
      [](uint64_t stream) {
        const GilRelease no_gil;
        return CudaDriver::get().key(as_stream(stream));
      },
      nb::arg("stream"), "A number that is unique among the streams of all GPUs.");
  m.def("wait", &wait, nb::arg("waiting"), nb::arg("stream"),
        "Let later work in one stream wait for the current work in another.");
  m.def("exported_array", &exported_array, nb::arg("capsule"),
        R"(An array that DLPack exports, of any device.

Returns
-------
address : int
dtype : str
shape : tuple of int
is_contiguous : bool
holder : object
    Holds the memory.)");
  m.def("lock_pages", &lock_pages, nb::arg("array"),
        "Lock an array's pages, so that copies do not wait for the CPU.");
  m.def("unlock_pages", &unlock_pages, nb::arg("address"), "Unlock pages by the address of their array.");
}

}  // namespace ktmoe::bindings
