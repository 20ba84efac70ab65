"""Arrays on a GPU, from any library: their addresses, and new arrays of the same kind."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from .checks import bfloat16
from .dlpack import exported, handed_over, is_on_cuda
from .library import dtype_name, find_library, is_of
from .spec import ArraySpec

__all__ = ["DeviceArray", "cast_array", "device_array", "given_back", "new_like", "stream_handle"]


_ON_DEVICE = " on a CUDA device"


class DeviceArray(NamedTuple):
    """A contiguous array on a GPU."""

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    owner: Any  #: the array itself, which keeps the memory alive
    export: object = None  #: of an exported array: another owner of the memory


def device_array(value: Any, name: str, spec: ArraySpec, stream: int) -> DeviceArray:
    """A torch, CuPy or JAX array, or another with ``__cuda_array_interface__``.

    The stream is where it will be used.

    Raises
    ------
    TypeError
        Not on a CUDA device, another dtype, or not contiguous.
    ValueError
        Another shape.
    """
    found, has_gaps = _found(value, stream)
    if found is not None and not has_gaps and spec.fits(found):
        return found
    if found is None:
        raise TypeError(f"{name}: got {type(value).__name__} on the CPU, expected {spec}{_ON_DEVICE}")
    spec.check(name, found, where=_ON_DEVICE)
    raise TypeError(f"{name}: got gaps in an array, expected {spec}{_ON_DEVICE}")


def cast_array(value: Any, to: np.dtype[Any], castable: Collection[str], stream: int) -> Any:
    """An array of a device in another dtype if it has one of those; else, or if that cannot be, as it is."""
    library = find_library(value)
    if library is None or dtype_name(value) not in castable:
        return value
    return library.cast_in_stream(value, to, stream)


def _found(value: Any, stream: int) -> tuple[DeviceArray | None, bool]:
    """An array on a device, and whether it has gaps; None of what is not there."""
    library = find_library(value)
    name = "" if library is None else library.name
    if name == "torch":
        return _of_torch(value) if value.is_cuda else (None, False)
    interface = None if name == "JAX" else getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        return _of_interface(value, interface)
    return _of_dlpack(value, stream) if is_on_cuda(value) else (None, False)


def new_like(value: Any) -> Any:
    """A new array of the same kind, dtype and shape.

    Raises
    ------
    TypeError
        Arrays of this kind cannot be made here.
    """
    library = find_library(value)
    if library is not None:
        return library.empty_like(value)
    kind = type(value).__name__
    raise TypeError(f"out: got None, expected an array on the device to write to: a {kind} cannot be made")


def given_back(array: DeviceArray, stream: int) -> Any:
    """An array that was written to in a stream, as its library has arrays."""
    return handed_over(array.owner, stream) if is_of("JAX", array.owner) else array.owner


def stream_handle(stream: Any) -> int:
    """The handle of a torch or CuPy stream, or of one given as a number.

    Raises
    ------
    TypeError
        Something else.
    """
    for attribute in ("cuda_stream", "ptr"):
        handle = getattr(stream, attribute, None)
        if isinstance(handle, int):
            return handle
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    raise TypeError(f"cuda_stream: got {stream!r}, expected a torch or CuPy stream, or the handle of one")


#: Dtypes of torch, as they come.
_torch_dtypes: dict[Any, np.dtype[Any]] = {}


def _of_torch(value: Any) -> tuple[DeviceArray, bool]:
    dtype = _torch_dtypes.get(value.dtype)
    if dtype is None:
        dtype = _torch_dtypes[value.dtype] = np.dtype(dtype_name(value))
    return DeviceArray(value.data_ptr(), dtype, tuple(value.shape), value), not value.is_contiguous()


def _of_dlpack(value: Any, stream: int) -> tuple[DeviceArray, bool]:
    address, name, shape, is_contiguous, holder = exported(value, stream)
    return DeviceArray(address, np.dtype(name), shape, value, holder), not is_contiguous


def _of_interface(value: Any, interface: dict[str, Any]) -> tuple[DeviceArray, bool]:
    # ml_dtypes' bfloat16 is two bytes without a name there.
    is_bf16 = interface["typestr"][1:] == "V2"
    dtype = bfloat16 if is_bf16 else np.dtype(interface["typestr"])
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    array = DeviceArray(int(interface["data"][0]), dtype, shape, value)
    if strides is None:
        return array, False
    steps = np.cumprod([dtype.itemsize, *shape[:0:-1]])[::-1].tolist() if shape else []
    return array, list(strides) != steps
