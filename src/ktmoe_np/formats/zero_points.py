"""int4 weights with zero points: how checkpoints pack them, and the rows of the engine's that they become.

All are brought to one form: a matrix [N, K] is rows of nibbles q, two per byte, the low one first, with a
scale and a zero point z for each group of columns, for weights (q - z) * scale.

A row of the engine's is blocks of 32, 64 or 128 values: a float16 scale, a zero point and, for
each 32 of them, 16 bytes with the first half in the low nibbles and the second half in the high ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import Array
from .conversion import convert_each
from .gptq import group_sizes

__all__ = ["ZeroPointMatrix", "from_awq", "from_compressed_tensors", "from_gptq", "int4_zp_rows"]

Bytes = NDArray[np.uint8]

#: Columns whose nibbles AWQ has in the low and the high halves of the four bytes of a number.
_AWQ_LOW, _AWQ_HIGH = [0, 4, 1, 5], [2, 6, 3, 7]

#: The zero point of symmetric weights.
_SYMMETRIC = 8


class ZeroPointMatrix(NamedTuple):
    """The matrix of an expert."""

    codes: Bytes  # [N, K / 2]
    scale: Array  # [N, G]: numbers that float16 has
    zero: Bytes  # [N, G]


def from_awq(qweight: Array, scales: Array, qzeros: Array) -> ZeroPointMatrix:
    """Unpack AWQ's matrix, "GEMM" version: eight of N in a number, in an order of their own.

    Parameters
    ----------
    qweight : ndarray of int32, [K, N / 8]
    scales : ndarray of float16, [G, N]
    qzeros : ndarray of int32, [G, N / 8]

    Examples
    --------
    >>> qweight = np.array([[0x75316420], [0x75316420]], np.int32)
    >>> from_awq(qweight, np.ones((1, 8), np.float16), qweight[:1]).codes[:, 0].tolist()
    [0, 17, 34, 51, 68, 85, 102, 119]
    """
    num_columns, num_words = qweight.shape
    low, high = _halves_of_words(qweight)
    pairs = np.empty((num_columns // 2, num_words, 8), np.uint8)
    pairs[..., _AWQ_LOW] = low[0::2] | low[1::2] << np.uint8(4)
    pairs[..., _AWQ_HIGH] = high[0::2] | high[1::2] << np.uint8(4)
    zero = np.empty((len(qzeros), num_words, 8), np.uint8)
    zero[..., _AWQ_LOW], zero[..., _AWQ_HIGH] = _halves_of_words(qzeros)
    return ZeroPointMatrix(_turned(pairs), np.ascontiguousarray(scales.T), _turned(zero))


def from_gptq(qweight: Array, scales: Array, qzeros: Array, *, less: int = 1) -> ZeroPointMatrix:
    """Unpack GPTQ's matrix: eight of K in a number; of zero points eight of N.

    Parameters
    ----------
    qweight : ndarray of int32, [K / 8, N]
    scales : ndarray of float16 or bfloat16, [G, N]
    qzeros : ndarray of int32, [G, N / 8]
    less : int
        What stored zero points are less than those that count, modulo 16: 1 in the first version of the
        format, which stores 15 for 0.

    Examples
    --------
    >>> words = np.full((4, 8), 0x76543210, np.int32)
    >>> matrix = from_gptq(words, np.ones((1, 8), np.float16), words[:1, :1])
    >>> matrix.codes[0, :4].tolist(), matrix.zero.ravel().tolist()
    ([16, 50, 84, 118], [1, 2, 3, 4, 5, 6, 7, 8])
    """
    num_words, num_rows = qweight.shape
    codes = _bytes_of_words(qweight).swapaxes(0, 1).reshape(num_rows, 4 * num_words)
    low, high = _halves_of_words(qzeros)
    zero = np.stack([low, high], axis=-1) + np.uint8(less) & np.uint8(15)
    return ZeroPointMatrix(codes, np.ascontiguousarray(scales.T), _turned(zero))


def from_compressed_tensors(
    weight_packed: Array, weight_scale: Array, weight_zero_point: Array | None
) -> ZeroPointMatrix:
    """Unpack compressed-tensors' matrix: eight of K in a number, of zero points eight of N.

    Parameters
    ----------
    weight_packed : ndarray of int32, [N, K / 8]
    weight_scale : ndarray of float16 or bfloat16, [N, G]
    weight_zero_point : ndarray of int32, [ceil(N / 8), G], optional
        Of symmetric weights there is none.

    Examples
    --------
    >>> words = np.full((8, 4), 0x76543210, np.int32)
    >>> matrix = from_compressed_tensors(words, np.ones((8, 1), np.float16), words[:1, :1])
    >>> matrix.codes[0, :4].tolist(), matrix.zero.ravel().tolist()
    ([16, 50, 84, 118], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    codes = weight_packed.view(np.uint8)
    if weight_zero_point is None:
        return ZeroPointMatrix(codes, weight_scale, np.full(weight_scale.shape, _SYMMETRIC, np.uint8))
    num_rows, num_groups = weight_scale.shape
    low, high = _halves_of_words(weight_zero_point)
    of_words = np.stack([low, high], axis=-1).reshape(-1, num_groups, 8)
    zero = of_words.swapaxes(1, 2).reshape(-1, num_groups)[:num_rows]
    return ZeroPointMatrix(codes, weight_scale, np.ascontiguousarray(zero))


def _bytes_of_words(words: Array) -> Bytes:
    """The bytes of int32 [.., M], [.., M, 4], the lowest first."""
    little: Array = np.ascontiguousarray(words, "<i4")
    return little.view(np.uint8).reshape(*words.shape, 4)


def _halves_of_words(words: Array) -> tuple[Bytes, Bytes]:
    """The low and the high nibbles of each of a number's bytes."""
    numbers = _bytes_of_words(words)
    return numbers & np.uint8(15), numbers >> np.uint8(4)


def _turned(rows: Bytes) -> Bytes:
    """Rows of columns, [M, ..] with the rest one axis, transposed."""
    return np.ascontiguousarray(rows.reshape(len(rows), -1).T)


def int4_zp_rows(
    codes: Sequence[Array] | Array,
    scale: Sequence[Array] | Array,
    zero: Sequence[Array] | Array,
    block_size: int,
) -> Bytes:
    """Convert the matrices of experts. Every product of scale and code less zero point stays what it was.

    Parameters
    ----------
    codes : E arrays of uint8 [N, K / 2]
    scale : E arrays of float16 [N, G], or of numbers that float16 has
        `group_sizes` tells the groups by their number.
    zero : E arrays of uint8 [N, G]
        Up to 31.
    block_size : int
        32, 64 or 128: a divisor of K and of the size of groups.

    Returns
    -------
    ndarray of uint8 [E, N, K / block_size * (3 + block_size / 2)]

    Examples
    --------
    >>> codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    >>> scale, zero = np.ones((1, 1, 1), np.float16), np.full((1, 1, 1), 7, np.uint8)
    >>> int4_zp_rows(codes, scale, zero, 32).tobytes().hex(" ")
    '00 3c 07 80 00 91 00 a2 00 b3 00 c4 00 d5 00 e6 00 f7 00'
    """
    num_rows, num_pairs = codes[0].shape
    num_blocks = 2 * num_pairs // block_size
    rows = np.empty((len(codes), num_rows, num_blocks * (3 + block_size // 2)), np.uint8)

    convert_each(partial(_convert, block_size=block_size), codes, scale, zero, rows)
    return rows


def _convert(codes: Array, scale: Array, zero: Array, rows: Bytes, *, block_size: int) -> None:
    """Write one matrix's rows."""
    num_pairs = codes.shape[1]
    of_block = np.arange(0, 2 * num_pairs, block_size) // group_sizes(2 * num_pairs)[scale.shape[1]]
    kind = np.dtype([("scale", "<f2"), ("zero", "u1"), ("codes", "u1", (block_size // 32, 16))])
    blocks = rows.view(kind)
    blocks["scale"] = scale.astype("<f2", copy=False)[:, of_block]
    blocks["zero"] = zero[:, of_block]
    halves = np.ascontiguousarray(codes).reshape(*blocks["codes"].shape[:-1], 2, 8)
    first, last = halves[..., 0, :], halves[..., 1, :]
    blocks["codes"][..., 0::2] = first & np.uint8(15) | last << np.uint8(4)
    blocks["codes"][..., 1::2] = first >> np.uint8(4) | last & np.uint8(0xF0)
