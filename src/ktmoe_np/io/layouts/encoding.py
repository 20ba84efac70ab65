"""A row of the table of encodings: the tensors of a matrix, and the requirements on each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...formats.zero_points import ZeroPointMatrix

__all__ = ["AnyArray", "Encoding", "Shapes", "Sizes", "TensorSpec"]

AnyArray = NDArray[Any]
Shapes = tuple[tuple[int, ...], ...]


class Sizes(NamedTuple):
    """The data that the contents of a tensor are checked against."""

    num_rows: int
    num_columns: int
    scale: tuple[int, ...]  # the shape of the matrix's scales


@dataclass(frozen=True)
class TensorSpec:
    """One of the tensors that make up a matrix.

    Parameters
    ----------
    suffix : str
        What its name has behind the projection's.
    dtypes : tuple of str
        Safetensors dtypes that it may have.
    shapes : callable
        N and K of the matrix -> the shapes that it may have.
    problem : callable, optional
        Of a tensor whose contents matter: the array, and the data to check it against -> the error, None if
        nothing.
    optional : bool
        Whether a projection may be without it; of one that has it, every expert must have it.
    """

    suffix: str
    dtypes: tuple[str, ...]
    shapes: Callable[[int, int], Shapes]
    problem: Callable[[AnyArray, Sizes], str | None] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Encoding:
    """One way of storing a quantized matrix `[N, K]`.

    Parameters
    ----------
    method : str
        The method that multiplies it.
    codes, scale : TensorSpec
        The weights and their scales.
    scale_dtype : numpy.dtype
        What the scales are handed on as.
    values : int
        Weights in an element of `codes`.
    group_size : int
        K must be a multiple of it.
    global_scale : TensorSpec, optional
        A factor of the whole matrix.
    reciprocal : bool
        Whether weights are divided by `global_scale`, not multiplied.
    others : tuple of TensorSpec
        Tensors that are checked and not handed on.
    transposed : bool
        Whether codes are rows of K; otherwise they are rows of N.
    refused : tuple of str
        Suffixes of tensors that would change what the codes mean.
    zeros : TensorSpec, optional
        Zero points, of encodings that `unpack` takes apart.
    unpack : callable, optional
        Codes, scales, zero points (None where an optional one is not there) and the version of the format ->
        what the method's layers are given.
    packed_rows : int
        Rows in an element of `codes`.
    symmetric : bool, optional
        Of encodings whose tensors look alike: whether it is the one for symmetric weights.
    """

    method: str
    codes: TensorSpec
    scale: TensorSpec
    scale_dtype: np.dtype[Any]
    values: int = 1
    group_size: int = 1
    global_scale: TensorSpec | None = None
    reciprocal: bool = False
    others: tuple[TensorSpec, ...] = ()
    transposed: bool = False
    refused: tuple[str, ...] = ()
    zeros: TensorSpec | None = None
    unpack: Callable[[AnyArray, AnyArray, AnyArray | None, int], ZeroPointMatrix] | None = None
    packed_rows: int = 1
    symmetric: bool | None = None

    @property
    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of a matrix, codes first."""
        specs = (self.codes, self.scale, self.global_scale, self.zeros, *self.others)
        return tuple(spec for spec in specs if spec is not None)

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """N and K of the matrix whose codes have this shape of two or more axes."""
        if self.transposed:
            return shape[1] * self.packed_rows, shape[0] * self.values
        return shape[0], math.prod(shape[1:]) * self.values
