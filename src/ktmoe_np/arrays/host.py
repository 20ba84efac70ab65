"""Arrays on the host, from any library, as NumPy arrays of the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import kt_kernel_ext as ext
from .library import ArrayLibrary, find_library
from .types import Array, bfloat16

__all__ = ["as_numpy", "check_not_differentiated", "giver_of", "of_a_library", "to_write"]

#: What libraries raise for arrays that NumPy cannot view.
_REFUSALS = (TypeError, RuntimeError, ValueError, BufferError)


def as_numpy(value: Any, name: str) -> Array:
    """An array from any library as a NumPy array of the same memory.

    Raises
    ------
    TypeError
        Not an array, or one that is not on the CPU.
    """
    if isinstance(value, np.ndarray):
        return value
    library = find_library(value)
    try:
        return _exported(value, name, writable=False) if library is None else library.host_view(value)
    except _REFUSALS as error:
        raise _not_readable(value, name, error) from error


def to_write(value: Any, name: str) -> Array:
    """An array from any library that will be written to, as a NumPy array of the same memory.

    Raises
    ------
    TypeError
        Not an array, or one that is not on the CPU, or of a library whose arrays do not change.
    ValueError
        A read-only array.
    """
    if type(value) is np.ndarray:
        return value  # the engine looks whether it can be written to
    library = find_library(value)
    if library is None:
        return _exported(value, name, writable=True)
    if library.name == "JAX":
        raise TypeError(f"{name}: got a JAX array, which cannot be written, expected None or another array")
    check_not_differentiated(value, name, library)
    return as_numpy(value, name)


def giver_of(value: Any) -> Callable[[Array], Any]:
    """What makes a NumPy array one of the kind of another array."""
    library = find_library(value)
    return _as_numpy if library is None else library.giver(value)


def of_a_library(value: Any, name: str) -> Any:
    """An array of a library as it is; one that only exports memory of the host as a NumPy array of that.

    Anything else comes back as it is, to be refused by name.
    """
    exports = any(hasattr(value, protocol) for protocol in ("__array_interface__", "__dlpack__"))
    return as_numpy(value, name) if exports and find_library(value) is None else value


def check_not_differentiated(value: Any, name: str, library: ArrayLibrary | None = None) -> None:
    """Refuse an array whose gradient would silently be lost.

    Raises
    ------
    TypeError
        A torch tensor that requires grad, while grad mode is on.
    """
    library = find_library(value) if library is None else library
    if library is not None and library.is_differentiated(value):
        raise TypeError(
            f"{name}: got a {library.name} tensor that requires grad, expected one without gradient: "
            "ktmoe_np.torch.moe_sft is differentiable, and this call may be made within torch.no_grad()"
        )


def _as_numpy(array: Array) -> Array:
    return array


def _not_readable(value: Any, name: str, error: Exception) -> TypeError:
    kind, told = type(value).__name__, str(error)
    if told.startswith(f"{name}: "):
        return TypeError(told)
    return TypeError(f"{name}: got {kind}, expected an array that NumPy can read: {told}")


class _Interface:
    """Memory as NumPy takes it; the array that it makes keeps this alive."""

    def __init__(self, interface: dict[str, Any], holder: object) -> None:
        self.__array_interface__ = interface
        self._holder = holder


def _exported(value: Any, name: str, *, writable: bool) -> Array:
    """The array of an object that is of no known library, by a protocol."""
    if hasattr(value, "__array_interface__"):
        return _named(np.asarray(value))
    if hasattr(value, "__dlpack__"):
        address, dtype_name, shape, strides, holder = ext.host_array(value, name, writable)
        dtype = np.dtype(dtype_name)
        interface = {
            "data": (address, not writable),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{dtype.itemsize}",
            "version": 3,
        }
        return np.asarray(_Interface(interface, holder)).view(dtype)
    if hasattr(value, "__array__"):
        return np.asarray(value)
    raise TypeError(
        f"{name}: got {type(value).__name__}, expected an array on the CPU (NumPy, or with __dlpack__)"
    )


def _named(array: Array) -> Array:
    """The array with the dtype that an interface cannot name: bfloat16 is two bytes there."""
    return array.view(bfloat16) if array.dtype == np.dtype("V2") else array
