"""The same numbers as arrays of every kind that calls take, and what arrays of any kind contain."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ktmoe_np.arrays.host import as_numpy
from ktmoe_np.arrays.library import find_library

__all__ = ["KINDS", "DLPackOnly", "InterfaceOnly", "Pinned", "kind_of", "numpy_of", "of_jax", "of_torch"]

_BF16 = np.dtype(ml_dtypes.bfloat16)


def of_torch(array: Any) -> Any:
    """A copy as a torch tensor on the CPU."""
    torch = pytest.importorskip("torch")
    if array.dtype == _BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def of_jax(array: Any) -> Any:
    """A copy as a JAX array on the CPU, 64 bits wide where the numbers are."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        return jax.device_put(array, jax.devices("cpu")[0])
    finally:
        jax.config.update("jax_enable_x64", before)


class DLPackOnly:
    """Nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = of_torch(array)

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class _Tensor(ctypes.Structure):
    """DLTensor of DLPack, and DLManagedTensor around it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Pinned:
    """Nothing but DLPack, in memory of the host that a GPU reaches, by the number of its kind there."""

    def __init__(self, array: Any, device_type: int = 3) -> None:
        self._array, self._device_type = np.ascontiguousarray(array), device_type
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        code = {"b": 6, "i": 0, "u": 1, "f": 2}.get(array.dtype.kind, 4)
        self._shape = shape  # kept alive, as the array is
        address, bits = self._array.ctypes.data, 8 * array.dtype.itemsize
        self._tensor = _Tensor(address, device_type, 0, array.ndim, code, bits, 1, shape)

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._tensor), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self._device_type, 0)


class InterfaceOnly:
    """Nothing but NumPy's interface, in which bfloat16 has no name."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__


#: By the name of what results are.
KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "NumPy": (lambda array: array.copy(), "NumPy"),
    "torch": (of_torch, "torch"),
    "JAX": (of_jax, "JAX"),
    "DLPack": (DLPackOnly, "NumPy"),
    "pinned": (Pinned, "NumPy"),
    "interface": (lambda array: InterfaceOnly(array.copy()), "NumPy"),
}


def kind_of(array: Any) -> str:
    """The name of the array's library."""
    library = find_library(array)
    assert library is not None
    return library.name


def numpy_of(array: Any) -> Any:
    """An array of any kind as a NumPy array."""
    return as_numpy(array, "array")
