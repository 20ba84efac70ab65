"""Arrays on a GPU, of whoever has them: where they lie, and how another of their kind is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .checks import bfloat16, fits
from .dlpack import exported, handed_over, is_of_jax, is_on_cuda, made_like
from .library import dtype_name

__all__ = ["DeviceArray", "device_array", "given_back", "new_like", "stream_handle"]


class DeviceArray(NamedTuple):
    """A contiguous array on a GPU."""

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    owner: Any  #: the array itself, which holds the memory
    export: object = None  #: what holds it too, of an array that was exported


def device_array(
    value: Any, name: str, dtypes: Sequence[Any], shape: tuple[int | str, ...], stream: int
) -> DeviceArray:
    """An array of torch, CuPy, JAX or another that has ``__cuda_array_interface__``, of one of some dtypes.

    A dimension that is a string may be any. The stream is where it will be used.

    Raises
    ------
    TypeError
        Not on a CUDA device, another dtype, or not contiguous.
    ValueError
        Another shape.
    """
    found, has_gaps = _found(value, stream)
    if found is not None and found.dtype in dtypes and not has_gaps and fits(found.shape, shape):
        return found
    kinds = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    expected = f"{kinds} [{', '.join(map(str, shape))}] on a CUDA device"
    if found is None:
        raise TypeError(f"{name}: got {type(value).__name__} on the CPU, expected {expected}")
    got = f"{found.dtype} {list(found.shape)}"
    if found.dtype not in dtypes:
        raise TypeError(f"{name}: got {got}, expected {expected}")
    if not fits(found.shape, shape):
        raise ValueError(f"{name}: got {got}, expected {expected}")
    raise TypeError(f"{name}: got gaps in an array, expected {expected}")


def _found(value: Any, stream: int) -> tuple[DeviceArray | None, bool]:
    """An array on a device, and whether it has gaps; None of what is not there."""
    if _is_of_torch(value):
        return _of_torch(value) if value.is_cuda else (None, False)
    interface = None if is_of_jax(value) else getattr(value, "__cuda_array_interface__", None)
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
    if _is_of_torch(value):
        return value.new_empty(value.shape)
    if type(value).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"].empty_like(value)
    if is_of_jax(value):
        return made_like(value)
    kind = type(value).__name__
    raise TypeError(f"out: got None, expected an array on the device to write to: a {kind} cannot be made")


def given_back(array: DeviceArray, stream: int) -> Any:
    """An array that was written to in a stream, as its library has arrays."""
    return handed_over(array.owner, stream) if is_of_jax(array.owner) else array.owner


def stream_handle(stream: Any) -> int:
    """The handle of a stream of torch or CuPy, or one that is given as a number.

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
    raise TypeError(f"cuda_stream: got {stream!r}, expected a stream of torch or CuPy, or the handle of one")


def _is_of_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "is_cuda")


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
