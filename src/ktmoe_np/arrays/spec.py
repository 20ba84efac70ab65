"""Requirements on an array: one check of dtypes and shapes, with one message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .library import dtype_name

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

    Examples
    --------
    >>> spec = ArraySpec((np.dtype(np.float32),), ("T", 8))
    >>> str(spec), spec.fits(np.zeros((3, 8), np.float32))
    ('float32 [T, 8]', True)
    >>> spec.check("topk_weights", np.zeros((3, 4), np.float32))
    Traceback (most recent call last):
    ValueError: topk_weights: got float32 [3, 4], expected float32 [T, 8]
    """

    dtypes: tuple[np.dtype[Any], ...]
    shape: tuple[int | str, ...]
    dtypes_name: str = ""

    def __str__(self) -> str:
        names = self.dtypes_name or " or ".join(dtype.name for dtype in self.dtypes)
        return f"{names} [{', '.join(map(str, self.shape))}]".lstrip()

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
        if found == expected:
            return True
        if expected[:1] == ("...",):
            expected = expected[1:]
            found = found[max(0, len(found) - len(expected)) :]
        return len(found) == len(expected) and all(
            isinstance(size, str) or size == there for there, size in zip(found, expected, strict=True)
        )

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
        raise kind(f"{name}: got {got}{of}, expected {self}{where}")
