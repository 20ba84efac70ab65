"""Requirements on an array: one check of dtypes and shapes, with one message."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .library import dtype_name
from .types import Array, bfloat16

__all__ = ["ArraySpec"]


@dataclass(frozen=True)
class ArraySpec:
    """The dtypes and the shape that an argument must have, in an array of any library.

    Parameters
    ----------
    dtypes : tuple of numpy.dtype
        Any of these; empty where the dtype is free.
    shape : tuple of int or str
        A size that is a string may be any: ``("T", 64)``. ``"..."`` in front stands for any leading axes.
    dtypes_name : str, optional
        What messages call the dtypes, in place of their names.
    as_bytes : bool
        Whether the dtypes are different views of the same bytes. The shape, of one axis or more, is that in
        the first dtype, which alone is named in messages; in another dtype the last axis has as many bytes.
    otherwise : callable, optional
        What messages add about an array of another dtype, from the name of that.
    sizes : mapping of str to a collection of int, optional
        What a size that is a string must be one of: ``{"G": (2, 1)}``. It may be any where there is no entry.

    Examples
    --------
    >>> spec = ArraySpec((np.dtype(np.float32),), ("T", 8))
    >>> str(spec), spec.fits(np.zeros((3, 8), np.float32))
    ('float32 [T, 8]', True)
    >>> spec.check("topk_weights", np.zeros((3, 4), np.float32))
    Traceback (most recent call last):
    ValueError: topk_weights: got float32 [3, 4], expected float32 [T, 8]
    >>> codes = ArraySpec((np.dtype(np.uint8), np.dtype(np.int32)), (2, 8), as_bytes=True)
    >>> codes.checked("gate_proj", np.zeros((2, 2), np.int32)).shape
    (2, 8)
    """

    dtypes: tuple[np.dtype[Any], ...]
    shape: tuple[int | str, ...]
    dtypes_name: str = ""
    as_bytes: bool = False
    sizes: Mapping[str, Collection[int]] | None = None
    otherwise: Callable[[str], str] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        named = self.dtypes[:1] if self.as_bytes else self.dtypes
        names = self.dtypes_name or " or ".join(dtype.name for dtype in named)
        choices = [f"{name} = {' or '.join(map(str, sizes))}" for name, sizes in (self.sizes or {}).items()]
        where = f" with {', '.join(choices)}" if choices else ""
        return f"{names} [{', '.join(map(str, self.shape))}]{where}".lstrip()

    def has_dtype(self, array: Any) -> bool:
        """Whether the array has one of the dtypes."""
        if not self.dtypes:
            return True
        dtype = array.dtype
        if isinstance(dtype, np.dtype):
            return dtype in self.dtypes
        return dtype_name(array) in [expected.name for expected in self.dtypes]

    def has_shape(self, array: Any) -> bool:
        """Whether the array has the shape."""
        found, expected = tuple(array.shape), self.shape
        if self.as_bytes:
            found = _in_bytes(found, array.dtype.itemsize)
            expected = _in_bytes(expected, self.dtypes[0].itemsize)
        if found == expected:
            return True
        if expected[:1] == ("...",):
            expected = expected[1:]
            found = found[max(0, len(found) - len(expected)) :]
        return len(found) == len(expected) and all(
            self._is_size(there, size) for there, size in zip(found, expected, strict=True)
        )

    def _is_size(self, found: int | str, expected: int | str) -> bool:
        if not isinstance(expected, str):
            return found == expected
        return self.sizes is None or expected not in self.sizes or found in self.sizes[expected]

    def fits(self, array: Any) -> bool:
        """Whether the array has one of the dtypes and the shape."""
        return self.has_dtype(array) and self.has_shape(array)

    def check(self, name: str, array: Any, *, of: str = "", where: str = "") -> None:
        """Raise unless the array is as it must be.

        Parameters
        ----------
        name : str
            What messages call the argument.
        array : array
        of, where : str
            What messages say behind what came, and behind what was expected: ``" for expert 3"``.

        Raises
        ------
        TypeError
            Another dtype.
        ValueError
            Another shape.
        """
        if self.fits(array):
            return
        got = f"{dtype_name(array)} {list(array.shape)}" if self.dtypes else f"shape {list(array.shape)}"
        kind = ValueError if self.has_dtype(array) else TypeError
        hint = "" if kind is ValueError else self._hint(array)
        raise kind(f"{name}: got {got}{of}, expected {self}{where}{hint}")

    def _hint(self, array: Any) -> str:
        """What to do with an array of another dtype."""
        if bfloat16 in self.dtypes and dtype_name(array) == "uint16":
            return "; bits of bfloat16 are given as array.view(ml_dtypes.bfloat16)"
        return "" if self.otherwise is None else self.otherwise(dtype_name(array))

    def checked(self, name: str, array: Array) -> Array:
        """A NumPy array that is as it must be; with `as_bytes` its bytes, uint8, which are not copied.

        Raises
        ------
        TypeError
            Another dtype, or bytes of an array whose last axis is not contiguous.
        ValueError
            Another shape.
        """
        self.check(name, array)
        if not self.as_bytes:
            return array
        if array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
            raise TypeError(f"{name}: got strides {list(array.strides)}, expected a contiguous last axis")
        return array.view(np.uint8)


def _in_bytes(shape: tuple[int | str, ...], itemsize: int) -> tuple[int | str, ...]:
    """A shape whose last axis, where it is a number, is counted in bytes."""
    if not shape or isinstance(shape[-1], str):
        return shape
    return (*shape[:-1], shape[-1] * itemsize)
