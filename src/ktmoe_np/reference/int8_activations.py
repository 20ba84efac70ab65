"""The product of int8 activations with weights that are integers times scales, to the bit.

The order is fixed: one float32 accumulator for an output, blocks of activations one after the other, and in
each the groups of weights one after the other, with one rounding for each addition.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .integer_matrix import IntegerMatrix
from .quantize import quantize_activations

__all__ = ["fma", "integer_product", "pieces"]

Array = NDArray[Any]


def integer_product(x: Array, matrix: IntegerMatrix) -> Array:
    """Multiply rows of activations, as int8 codes, with the rows of a matrix.

    x is cut into blocks of `activation_block` columns, groups of weights that are longer are cut there too.
    With xq and s of the blocks from `quantize_activations`, all in float32::

        acc = 0
        for each block b, and each group or piece of one in it, in ascending order:
          S = sum over its columns of xq * multiplier * code     exact, then rounded once
          acc = fma(scale * s_b, S, acc)                         the product scale * s_b is rounded
          M = sum over its columns of xq * minimum_multiplier    where there are minima
          acc = fma(-(minimum * s_b), M, acc)
        result = channel_scale * acc                             where there is one

    A block with a NaN or an infinity makes the results of its row NaN, whatever the weights.

    Parameters
    ----------
    x : ndarray of float32 or float64, [M, K]
        Numbers that bfloat16 represents.
    matrix : IntegerMatrix, [N, K]

    Returns
    -------
    ndarray of the dtype of x, [M, N]
        In float64 nothing of the above is rounded to float32, but for s.

    Raises
    ------
    ValueError
        Another K, or a matrix with more axes.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = IntegerMatrix(np.int8([[2, 3], [1, -1]]), np.float32([[0.5], [4]]), 32)
    >>> integer_product(np.float32([[127, -1]]), matrix)
    array([[125.5, 512. ]], dtype=float32)
    """
    if len(matrix.shape) != 2 or x.ndim != 2 or x.shape[1] != matrix.shape[1]:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [M, K] for a matrix {list(matrix.shape)}")
    codes, scale = quantize_activations(x, matrix.activation_block)
    operand = codes.astype(np.float64)
    integers = matrix.integers.astype(np.float64)
    minimum_integers = None if matrix.minimum is None else matrix.minimum_integers.astype(np.float64)
    acc = np.zeros((len(x), len(integers)), x.dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for block, group, columns in pieces(matrix):
            s, part = scale[:, block, None].astype(x.dtype), operand[:, columns]
            factor = matrix.scale[:, group].astype(x.dtype) * s
            acc = fma(factor, _sums(part, integers[:, columns]).astype(x.dtype), acc)
            if matrix.minimum is not None and minimum_integers is not None:
                factor = matrix.minimum[:, group].astype(x.dtype) * s
                acc = fma(-factor, _sums(part, minimum_integers[:, columns]).astype(x.dtype), acc)
        return acc if matrix.channel_scale is None else acc * matrix.channel_scale.astype(x.dtype)


def _sums(codes: Array, integers: Array) -> Array:
    """Sums of products of integers, [M, k] and [N, k] to [M, N]: below 2^53, so exact in float64; no -0."""
    sums: Array = codes @ integers.T + 0.0
    return sums


def pieces(matrix: IntegerMatrix) -> Iterator[tuple[int, int, slice]]:
    """Yield block, group and columns of the pieces that blocks and groups cut a row into."""
    num_columns = matrix.shape[-1]
    sizes = matrix.activation_block, matrix.group_size
    cuts = sorted({start for size in sizes for start in range(0, num_columns, size)} | {num_columns})
    for start, end in pairwise(cuts):
        yield start // matrix.activation_block, start // matrix.group_size, slice(start, end)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Compute a * b + c with one rounding.

    Parameters
    ----------
    a, b, c : ndarray of float32, of shapes that broadcast
        Of float64 the product is rounded too.

    Returns
    -------
    ndarray of the same dtype

    Examples
    --------
    >>> import numpy as np
    >>> a = np.float32([1 + 2**-12])
    >>> fma(a, a, np.float32([-1])) - (a * a - 1) == 2**-24
    array([ True])
    """
    if np.result_type(a, b, c) == np.float64:
        return a * b + c
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        # Exact: two significands of 24 bits.
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        return _to_odd(*np.broadcast_arrays(product, np.asarray(c, np.float64))).astype(np.float32)


def _to_odd(p: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute p + c rounded to odd: of the two float64 around it, the one with an odd significand.

    To float32 it rounds as the exact sum does: the last of 53 bits tells whether anything is behind them.
    """
    total = np.asarray(p + c)
    # What the addition lost, exactly (Knuth's two-sum).
    of_c = total - p
    lost = (p - (total - of_c)) + (c - of_c)
    bits = total.view(np.int64)
    inexact = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
    away = (lost > 0) == (total > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)
