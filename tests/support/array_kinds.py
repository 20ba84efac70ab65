"""The same numbers as arrays of every kind that calls take, and what arrays of any kind contain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ktmoe_np.arrays.host import as_numpy
from ktmoe_np.arrays.library import find_library

__all__ = ["KINDS", "DLPackOnly", "InterfaceOnly", "kind_of", "numpy_of", "of_jax", "of_torch"]

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
    """Nothing but DLPack, from memory of the CPU or, by a number of DLPack's, of another device."""

    def __init__(self, array: Any) -> None:
        self._array = of_torch(array)

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


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
