"""Types of what public functions take: arrays of any library, CUDA streams, paths; and bfloat16."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "ArrayLike",
    "ExpertArrays",
    "IntegersLike",
    "MaskLike",
    "PathLike",
    "StreamLike",
    "bfloat16",
]

bfloat16 = np.dtype(ml_dtypes.bfloat16)

#: A NumPy array of any dtype.
Array = NDArray[Any]


class ArrayLike(Protocol):
    """An array of NumPy, torch, JAX or CuPy, or one with ``__dlpack__`` or ``__array_interface__`` alone."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its axes."""

    @property
    def dtype(self) -> Any:
        """Its dtype, an object of its library."""


#: One array [E, ...], or a sequence of E arrays.
ExpertArrays: TypeAlias = ArrayLike | Sequence[ArrayLike]

#: Integers in an array of any library, or in (nested) lists.
IntegersLike: TypeAlias = ArrayLike | Sequence[int] | Sequence[Sequence[int]]

#: A bool for each of E experts.
MaskLike: TypeAlias = ArrayLike | Sequence[bool]

PathLike: TypeAlias = str | os.PathLike[str]


class _TorchStream(Protocol):
    @property
    def cuda_stream(self) -> int:
        """The handle."""


class _CupyStream(Protocol):
    @property
    def ptr(self) -> int:
        """The handle."""


#: A torch or CuPy CUDA stream, or the handle of one.
StreamLike: TypeAlias = int | _TorchStream | _CupyStream
