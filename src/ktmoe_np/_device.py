"""Arrays on a GPU, of whoever has them: where they lie, and how another of their kind is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._arrays import bfloat16
from ._dlpack import exported, handed_over, is_of_jax, is_on_cuda, made_like

__all__ = ["DeviceArray", "device_array", "given_back", "is_on_device", "new_like", "stream_handle"]


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array on a GPU."""

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    owner: Any  #: the array itself, which holds the memory
    export: object = None  #: what holds it too, of an array that was exported


def is_on_device(value: Any) -> bool:
    """Whether an array says that it lies on a CUDA device."""
    if _is_of_torch(value):
        return bool(value.is_cuda)
    if isinstance(value, np.ndarray):
        return False
    return hasattr(value, "__cuda_array_interface__") or is_on_cuda(value)


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
    kinds = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    expected = f"{kinds} [{', '.join(map(str, shape))}] on a CUDA device"
    if not is_on_device(value):
        raise TypeError(f"{name}: got {type(value).__name__} on the CPU, expected {expected}")
    if _is_of_torch(value):
        found, is_contiguous = _of_torch(value)
    elif is_of_jax(value) or not hasattr(value, "__cuda_array_interface__"):
        found, is_contiguous = _of_dlpack(value, stream)
    else:
        found, is_contiguous = _of_interface(value)
    got = f"{found.dtype} {list(found.shape)}"
    if found.dtype not in dtypes:
        raise TypeError(f"{name}: got {got}, expected {expected}")
    fits = len(found.shape) == len(shape) and all(
        isinstance(want, str) or size == want for size, want in zip(found.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: got {got}, expected {expected}")
    if not is_contiguous:
        raise TypeError(f"{name}: got gaps in an array, expected {expected}")
    return found


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


def _of_torch(value: Any) -> tuple[DeviceArray, bool]:
    name = str(value.dtype).removeprefix("torch.")
    dtype = bfloat16 if name == "bfloat16" else np.dtype(name)
    array = DeviceArray(int(value.data_ptr()), dtype, tuple(value.shape), value)
    return array, bool(value.is_contiguous())


def _of_dlpack(value: Any, stream: int) -> tuple[DeviceArray, bool]:
    address, name, shape, is_contiguous, holder = exported(value, stream)
    dtype = bfloat16 if name == "bfloat16" else np.dtype(name)
    return DeviceArray(address, dtype, shape, value, holder), is_contiguous


def _of_interface(value: Any) -> tuple[DeviceArray, bool]:
    interface = value.__cuda_array_interface__
    # ml_dtypes' bfloat16 is two bytes without a name there.
    is_bf16 = interface["typestr"][1:] == "V2"
    dtype = bfloat16 if is_bf16 else np.dtype(interface["typestr"])
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    array = DeviceArray(int(interface["data"][0]), dtype, shape, value)
    steps = np.cumprod([dtype.itemsize, *shape[:0:-1]])[::-1].tolist() if shape else []
    return array, strides is None or list(strides) == steps
