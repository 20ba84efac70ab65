"""Weight matrices as integers times scales, and their values.

Each is a stack `[..., N, K]` of matrices, most often `[E, N, K]`; its rows are the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from .activation import round_bf16

__all__ = [
    "QUANTIZED",
    "Int4Matrix",
    "Int8GroupMatrix",
    "Int8Matrix",
    "QuantizedMatrix",
    "ScaledMatrix",
    "check_member",
    "dequantize",
    "gradient_weights",
    "num_groups",
    "product_weights",
    "spread",
]

#: Group sizes that an `Int4Matrix` may have.
INT4_GROUP_SIZES = (32, 64, 128)


def num_groups(num_columns: int, group_size: int) -> int:
    """Count the groups of a row; the last one may be short."""
    return -(-num_columns // group_size)


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """w = channel_scale * code, with codes from -127 to 127.

    Parameters
    ----------
    codes : ndarray of int8, [..., N, K]
    channel_scale : ndarray of float32, [..., N]

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape; a code of -128.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = Int8Matrix(np.int8([[3, -2]]), np.float32([0.5]))
    >>> matrix.shape, dequantize(matrix)
    ((1, 2), array([[ 1.5, -1. ]], dtype=float32))
    """

    codes: NDArray[np.int8]
    channel_scale: NDArray[np.float32]

    def __post_init__(self) -> None:
        check_member("codes", self.codes, np.int8, None)
        check_member("channel_scale", self.channel_scale, np.float32, self.shape[:-1])
        _check_range("codes", self.codes, -127, 127)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]."""
        return self.codes.shape

    def __getitem__(self, at: Any) -> Int8Matrix:
        """Index the axes before N and K."""
        return Int8Matrix(self.codes[at], self.channel_scale[at])


@dataclass(frozen=True, eq=False)
class Int8GroupMatrix:
    """w = group_scale * code, a scale for every `group_size` columns of a row.

    Parameters
    ----------
    codes : ndarray of int8, [..., N, K]
    group_scale : ndarray of float32, [..., N, ceil(K / group_size)]
    group_size : int, optional

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape; a code of -128; a group size below 1.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = Int8GroupMatrix(np.int8([[3, -2, 1]]), np.float32([[0.5, 2]]), group_size=2)
    >>> dequantize(matrix)
    array([[ 1.5, -1. ,  2. ]], dtype=float32)
    """

    codes: NDArray[np.int8]
    group_scale: NDArray[np.float32]
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size: got {self.group_size}, expected at least 1")
        check_member("codes", self.codes, np.int8, None)
        groups = num_groups(self.shape[-1], self.group_size)
        check_member("group_scale", self.group_scale, np.float32, (*self.shape[:-1], groups))
        _check_range("codes", self.codes, -127, 127)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]."""
        return self.codes.shape

    def __getitem__(self, at: Any) -> Int8GroupMatrix:
        """Index the axes before N and K."""
        return Int8GroupMatrix(self.codes[at], self.group_scale[at], self.group_size)


@dataclass(frozen=True, eq=False)
class Int4Matrix:
    """w = channel_scale * (m * q): two levels of scales, so that a row is one float32 times int8 codes m * q.

    Parameters
    ----------
    q : ndarray of int8, [..., N, K]
        From -8 to 7.
    multiplier : ndarray of int8, [..., N, ceil(K / group_size)]
        m of a group of `group_size` columns, from -15 to 15, not 0.
    channel_scale : ndarray of float32, [..., N]
    group_size : int, optional
        32, 64 or 128.

    Raises
    ------
    TypeError, ValueError
        Another dtype, shape, value or group size.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = Int4Matrix(np.int8([[-8, 7, 0]]), np.int8([[-15]]), np.float32([0.5]))
    >>> matrix.codes, dequantize(matrix)
    (array([[ 120, -105,    0]], dtype=int8), array([[ 60. , -52.5,   0. ]], dtype=float32))
    """

    q: NDArray[np.int8]
    multiplier: NDArray[np.int8]
    channel_scale: NDArray[np.float32]
    group_size: int = 32

    def __post_init__(self) -> None:
        check_int4_group_size(self.group_size)
        check_member("q", self.q, np.int8, None)
        groups = num_groups(self.shape[-1], self.group_size)
        check_member("multiplier", self.multiplier, np.int8, (*self.shape[:-1], groups))
        check_member("channel_scale", self.channel_scale, np.float32, self.shape[:-1])
        _check_range("q", self.q, -8, 7)
        _check_range("multiplier", self.multiplier, -15, 15)
        if not self.multiplier.all():
            raise ValueError("multiplier: got 0, expected from -15 to 15, but not 0")

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]."""
        return self.q.shape

    @property
    def codes(self) -> NDArray[np.int8]:
        """The products m * q, [..., N, K]: from -120 to 120."""
        products: NDArray[np.int8] = self.q * spread(self.multiplier, self.group_size, self.shape[-1])
        return products

    def __getitem__(self, at: Any) -> Int4Matrix:
        """Index the axes before N and K."""
        return Int4Matrix(self.q[at], self.multiplier[at], self.channel_scale[at], self.group_size)


@dataclass(frozen=True, eq=False)
class ScaledMatrix:
    """w = channel_scale * code, with codes of bfloat16.

    Parameters
    ----------
    codes : ndarray of bfloat16, [..., N, K]
    channel_scale : ndarray of float32, [..., N]

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> matrix = ScaledMatrix(np.array([[1.5, -2]], ml_dtypes.bfloat16), np.float32([3]))
    >>> dequantize(matrix)
    array([[ 4.5, -6. ]], dtype=float32)
    """

    codes: NDArray[Any]
    channel_scale: NDArray[np.float32]

    def __post_init__(self) -> None:
        check_member("codes", self.codes, ml_dtypes.bfloat16, None)
        check_member("channel_scale", self.channel_scale, np.float32, self.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]."""
        return self.codes.shape

    def __getitem__(self, at: Any) -> ScaledMatrix:
        """Index the axes before N and K."""
        return ScaledMatrix(self.codes[at], self.channel_scale[at])


QuantizedMatrix = Int8Matrix | Int8GroupMatrix | Int4Matrix | ScaledMatrix
#: The members of `QuantizedMatrix`, for isinstance.
QUANTIZED = (Int8Matrix, Int8GroupMatrix, Int4Matrix, ScaledMatrix)


def dequantize(matrix: QuantizedMatrix, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Compute code * scale with one multiplication.

    Parameters
    ----------
    matrix : Int8Matrix, Int8GroupMatrix or Int4Matrix
    dtype : dtype, optional
        float32, or float64, in which the product is exact.

    Returns
    -------
    ndarray of `dtype`, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> dequantize(Int4Matrix(np.int8([[7]]), np.int8([[3]]), np.float32([2])))
    array([[42.]], dtype=float32)
    """
    if isinstance(matrix, Int8GroupMatrix):
        scale = spread(matrix.group_scale, matrix.group_size, matrix.shape[-1])
    else:
        scale = matrix.channel_scale[..., None]
    with np.errstate(over="ignore", under="ignore"):
        values: NDArray[Any] = matrix.codes.astype(dtype) * scale.astype(dtype)
    return values


def product_weights(matrix: QuantizedMatrix) -> NDArray[Any]:
    """Return what the forward product multiplies bfloat16 activations with.

    Parameters
    ----------
    matrix : Int8Matrix, Int8GroupMatrix or Int4Matrix

    Returns
    -------
    ndarray of bfloat16, [..., N, K]
        With channel scales the codes, which bfloat16 represents: y = channel_scale * sum of x * code, the
        scale applied in float32 to the sum. With group scales bf(code * scale), and no channel scale.

    Examples
    --------
    >>> import numpy as np
    >>> product_weights(Int4Matrix(np.int8([[7]]), np.int8([[3]]), np.float32([2]))).astype(np.float32)
    array([[21.]], dtype=float32)
    """
    if isinstance(matrix, Int8GroupMatrix):
        return gradient_weights(matrix)
    return matrix.codes.astype(np.float32).astype(ml_dtypes.bfloat16)


def gradient_weights(matrix: QuantizedMatrix) -> NDArray[Any]:
    """Return bf(code * scale), which gradients go through: their sums run over rows of different scales.

    Parameters
    ----------
    matrix : Int8Matrix, Int8GroupMatrix or Int4Matrix

    Returns
    -------
    ndarray of bfloat16, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> gradient_weights(Int8Matrix(np.int8([[127]]), np.float32([1.01]))).astype(np.float32)
    array([[128.]], dtype=float32)
    """
    return round_bf16(dequantize(matrix)).astype(ml_dtypes.bfloat16)


def check_int4_group_size(group_size: int) -> None:
    """Raise ValueError unless an `Int4Matrix` may have groups of that size."""
    if group_size not in INT4_GROUP_SIZES:
        raise ValueError(f"group_size: got {group_size}, expected 32, 64 or 128")


def spread(per_group: NDArray[Any], group_size: int, num_columns: int) -> NDArray[Any]:
    """Repeat the value of each group for its columns."""
    return np.repeat(per_group, group_size, axis=-1)[..., :num_columns]


def check_member(name: str, value: object, dtype: type, shape: tuple[int, ...] | None) -> None:
    """Raise TypeError or ValueError unless an array has the dtype and shape; None is [..., N, K]."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a NumPy array")
    if value.dtype != dtype:
        raise TypeError(f"{name}: got {value.dtype}, expected {np.dtype(dtype)}")
    if shape is None and value.ndim < 2:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [..., N, K]")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {list(shape)}")


def _check_range(name: str, value: NDArray[np.int8], low: int, high: int) -> None:
    wrong = value[(value < low) | (value > high)]
    if wrong.size:
        raise ValueError(f"{name}: got {wrong[0]}, expected from {low} to {high}")
