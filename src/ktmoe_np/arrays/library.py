"""NumPy, CuPy, JAX or torch arrays: functions whose names or behavior differ between the libraries.

Functions with the same name in all of them are called on `ArrayLibrary.xp`. Nothing is read back from a
device or copied to one but by `ArrayLibrary.beside`, so that calls go into CUDA graphs and JAX programs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from .types import Array, bfloat16

__all__ = ["ArrayLibrary", "dtype_name", "find_library", "is_of", "library_of"]


_erfc = np.frompyfunc(math.erfc, 1, 1)

#: Dtypes of ml_dtypes that torch has under the same names.
_OF_ML_DTYPES = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)

#: What JAX calls memory of the host that a GPU can reach, and memory of the host.
_HOST_MEMORY = ("pinned_host", "unpinned_host")


def _itself(array: Array) -> Array:
    return array


class ArrayLibrary:
    """NumPy, and the functions that the others have in common with it.

    Parameters
    ----------
    xp : module
        The namespace.
    """

    name = "NumPy"

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def host_view(self, x: Any) -> Array:
        """The same memory as a NumPy array.

        Raises
        ------
        TypeError
            The array is on a device, or has no values yet.
        """
        viewed: Array = x
        return viewed

    def giver(self, like: Any) -> Callable[[Array], Any]:
        """What makes a NumPy array one of this library, beside another; in the same memory if that can be."""
        return _itself

    def is_differentiated(self, x: Any) -> bool:
        """Whether calls on the array are recorded for gradients."""
        return False

    def cast_in_stream(self, x: Any, dtype: np.dtype[Any], stream: int) -> Any:
        """The array of a device in another dtype, by a CUDA stream; the array itself if that cannot be."""
        return x

    def beside(self, constant: Array, other: Any) -> Any:
        """A NumPy array as one on the device of the other."""
        return constant

    def integers(self, x: Any) -> Any:
        """Integers that may be compared with int32."""
        return x

    def float32(self, x: Any) -> Any:
        """The array in float32."""
        return x.astype(np.float32)

    def round_bf16(self, x: Any) -> Any:
        """A float32 array in bfloat16, to nearest with ties to even."""
        return x.astype(bfloat16)

    def filled(self, x: Any, where: Any, value: float) -> Any:
        """The array with a number where a mask is set; both are broadcast."""
        return self.xp.where(where, value, x)

    def product(self, x: Any, w: Any) -> Any:
        """X w^T in float32 for every matrix: bfloat16 [1 or G, T, K] and [G, N, K] to [G, T, N]."""
        return self.xp.matmul(self.float32(x), self.float32(w).swapaxes(-1, -2))

    def empty_like(self, x: Any) -> Any:
        """A new array of the same dtype and shape, beside the other."""
        return self.xp.empty_like(x)

    def erfc(self, x: Any) -> Any:
        """1 - erf(x), without canceling."""
        return np.asarray(_erfc(x), np.float32)


class _Cupy(ArrayLibrary):
    # Products are those of float32: in bfloat16 they would also come out in it.
    name = "CuPy"

    def host_view(self, x: Any) -> Array:
        raise TypeError(f"it is on {x.device}")

    def beside(self, constant: Array, other: Any) -> Any:
        with other.device:
            return self.xp.asarray(constant)

    def erfc(self, x: Any) -> Any:
        return self.xp.ElementwiseKernel("float32 x", "float32 y", "y = erfcf(x)", "ktmoe_erfc")(x)


class _Jax(ArrayLibrary):
    name = "JAX"

    def host_view(self, x: Any) -> Array:
        if isinstance(x, sys.modules["jax"].core.Tracer):
            raise TypeError("it is traced; calls in JAX programs are those of ktmoe_np.jax")
        if x.platform() != "cpu" and x.sharding.memory_kind not in _HOST_MEMORY:
            raise TypeError(f"it is on {x.platform()}")
        return np.asarray(x)

    def giver(self, like: Any) -> Callable[[Array], Any]:
        return partial(self._given, next(iter(like.devices())))

    def _given(self, device: Any, array: Array) -> Any:
        # A copy that is done: the memory may be written to by the next pass.
        return sys.modules["jax"].device_put(array, device, may_alias=False).block_until_ready()

    def beside(self, constant: Array, other: Any) -> Any:
        return self.xp.asarray(constant)

    def cast_in_stream(self, x: Any, dtype: np.dtype[Any], stream: int) -> Any:
        return x.astype(dtype)  # in JAX's own stream, for which the other waits when the array is exported

    def round_bf16(self, x: Any) -> Any:
        # A program may leave out a conversion that is undone by the next; it may not leave out this.
        rounded = sys.modules["jax"].lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return rounded.astype(bfloat16)

    def product(self, x: Any, w: Any) -> Any:
        return self.xp.matmul(x, w.swapaxes(-1, -2), preferred_element_type=np.float32)

    def empty_like(self, x: Any) -> Any:
        return self.xp.empty_like(x).block_until_ready()  # to be written to by others

    def erfc(self, x: Any) -> Any:
        return sys.modules["jax"].lax.erfc(x)


class _Torch(ArrayLibrary):
    name = "torch"

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        # torch's dtypes that NumPy does not have: integers of the same size, and what views them.
        named = {name: getattr(xp, name, None) for name in _OF_ML_DTYPES}
        self._bits = {
            dtype: (xp.int16 if name == "bfloat16" else xp.uint8, np.dtype(getattr(ml_dtypes, name)))
            for name, dtype in named.items()
            if dtype is not None
        }

    def host_view(self, x: Any) -> Array:
        if x.requires_grad:
            x = x.detach()
        bits = self._bits.get(x.dtype)
        if bits is None:
            values: Array = x.numpy()
            return values
        integers, dtype = bits
        viewed: Array = x.view(integers).numpy().view(dtype)
        return viewed

    def giver(self, like: Any) -> Callable[[Array], Any]:
        return self._given

    def _given(self, array: Array) -> Any:
        if array.dtype == bfloat16:
            return self.xp.from_numpy(array.view(np.int16)).view(self.xp.bfloat16)
        return self.xp.from_numpy(array)

    def is_differentiated(self, x: Any) -> bool:
        return bool(x.requires_grad and self.xp.is_grad_enabled())

    def cast_in_stream(self, x: Any, dtype: np.dtype[Any], stream: int) -> Any:
        if not x.is_cuda:
            return x
        with self.xp.cuda.stream(self.xp.cuda.ExternalStream(stream, device=x.device)):
            return x.to(getattr(self.xp, dtype.name))

    def beside(self, constant: Array, other: Any) -> Any:
        return self.xp.from_numpy(constant).to(other.device)

    def integers(self, x: Any) -> Any:
        return x.to(self.xp.int64)

    def float32(self, x: Any) -> Any:
        return x.to(self.xp.float32)

    def round_bf16(self, x: Any) -> Any:
        return x.to(self.xp.bfloat16)

    def filled(self, x: Any, where: Any, value: float) -> Any:
        return x.masked_fill(where, value)  # torch.where would copy the number to the device

    def empty_like(self, x: Any) -> Any:
        return x.new_empty(x.shape)  # contiguous, even if x is not

    def product(self, x: Any, w: Any) -> Any:
        if not self._has_mixed_product(w):
            return super().product(x, w)
        return self.xp.bmm(x.expand(len(w), -1, -1), w.swapaxes(-1, -2), out_dtype=self.xp.float32)

    def _has_mixed_product(self, w: Any) -> bool:
        """Whether torch multiplies bfloat16 to float32 there."""
        torch = self.xp
        return bool(w.is_cuda and torch.version.cuda and "dtype" in torch.ops.aten.bmm.overloads())

    def erfc(self, x: Any) -> Any:
        return self.xp.erfc(x)


#: Module, the name of its arrays' class, the namespace in it, and the library.
_LIBRARIES: tuple[tuple[str, str, str, type[ArrayLibrary]], ...] = (
    ("numpy", "ndarray", "numpy", ArrayLibrary),
    ("torch", "Tensor", "torch", _Torch),
    ("jax", "Array", "jax.numpy", _Jax),
    ("cupy", "ndarray", "cupy", _Cupy),
)


#: The libraries of the classes of arrays that have come.
_found: dict[type, ArrayLibrary] = {}


def find_library(value: Any) -> ArrayLibrary | None:
    """The library that an array is of, among those that the caller has imported; None of other objects."""
    known = _found.get(type(value))
    if known is not None:
        return known
    for module, kind, namespace, library in _LIBRARIES:
        if module in sys.modules and isinstance(
            value,
            getattr(sys.modules[module], kind, ()),  # not there while another thread imports it
        ):
            return _found.setdefault(type(value), library(sys.modules[namespace]))
    return None


def is_of(name: str, value: Any) -> bool:
    """Whether an array is of the library of that name: NumPy, torch, JAX or CuPy.

    Examples
    --------
    >>> is_of("NumPy", np.zeros(2)), is_of("JAX", np.zeros(2)), is_of("NumPy", [0, 0])
    (True, False, False)
    """
    found = find_library(value)
    return found is not None and found.name == name


def library_of(value: Any, name: str) -> ArrayLibrary:
    """The library that an array is of, among those that the caller has imported.

    Raises
    ------
    TypeError
        An array of none of them.
    """
    found = find_library(value)
    if found is not None:
        return found
    raise TypeError(f"{name}: got {type(value).__name__}, expected a NumPy, CuPy, JAX or torch array")


def dtype_name(value: Any) -> str:
    """The name of an array's dtype, the same in all libraries."""
    return str(value.dtype).removeprefix("torch.")
