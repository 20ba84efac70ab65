"""Rows of quantized matrices as bytes, in files and in the engine."""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import NDArray

from .quantized import Int4Matrix, Int8GroupMatrix, Int8Matrix, check_int4_group_size, num_groups

__all__ = ["pack_int4", "pack_int8", "unpack_int4", "unpack_int8", "unpack_nibbles"]

Bytes = NDArray[np.uint8]


def pack_int4(matrix: Int4Matrix) -> Bytes:
    """Lay out each row as its q, two per byte, then its multipliers.

    ::

        ceil(K / 2) bytes     q[2 i] in the low four bits of byte i, q[2 i + 1] in the high ones, in two's
                              complement; the high bits behind the last of an odd K are 0
        ceil(K / g) bytes     m of each group, int8

    Parameters
    ----------
    matrix : Int4Matrix, [..., N, K]
        Its channel scales are separate.

    Returns
    -------
    ndarray of uint8, [..., N, ceil(K / 2) + ceil(K / g)]

    Examples
    --------
    >>> import numpy as np
    >>> pack_int4(Int4Matrix(np.int8([[1, -2, 7]]), np.int8([[-15]]), np.float32([1])))
    array([[225,   7, 241]], dtype=uint8)
    """
    nibbles = matrix.q.view(np.uint8) & np.uint8(15)
    odd = matrix.shape[-1] % 2
    nibbles = np.pad(nibbles, [(0, 0)] * (nibbles.ndim - 1) + [(0, odd)])
    pairs = nibbles[..., ::2] | (nibbles[..., 1::2] << np.uint8(4))
    return np.concatenate([pairs, matrix.multiplier.view(np.uint8)], axis=-1)


def unpack_int4(
    rows: Bytes, channel_scale: NDArray[np.float32], num_columns: int, *, group_size: int = 32
) -> Int4Matrix:
    """Undo `pack_int4`.

    Parameters
    ----------
    rows : ndarray of uint8, [..., N, ceil(K / 2) + ceil(K / g)]
    channel_scale : ndarray of float32, [..., N]
    num_columns : int
        K.
    group_size : int, optional
        g: 32, 64 or 128.

    Returns
    -------
    Int4Matrix, [..., N, K]

    Raises
    ------
    ValueError
        Rows of another length, and what `Int4Matrix` refuses.
    TypeError
        Rows of another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> unpack_int4(np.uint8([[225, 7, 241]]), np.float32([1]), 3).q
    array([[ 1, -2,  7]], dtype=int8)
    """
    check_int4_group_size(group_size)
    num_pairs = -(-num_columns // 2)
    _check_rows(rows, num_pairs + num_groups(num_columns, group_size))
    nibbles = unpack_nibbles(rows[..., :num_pairs], num_columns).astype(np.int8)
    q = (nibbles ^ np.int8(8)) - np.int8(8)
    multiplier = np.ascontiguousarray(rows[..., num_pairs:]).view(np.int8)
    return Int4Matrix(q, multiplier, channel_scale, group_size)


def unpack_nibbles(pairs: Bytes, num_columns: int) -> Bytes:
    """Unpack bytes [..., ceil(K / 2)] to nibbles [..., K], the low one of a byte first."""
    nibbles = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1)
    return nibbles.reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])[..., :num_columns]


def pack_int8(matrix: Int8Matrix | Int8GroupMatrix) -> Bytes:
    """Lay out each row as its codes, then the scales of its groups if it has groups.

    ::

        K bytes                  codes, int8
        4 * ceil(K / g) bytes    scales of groups, float32 little-endian, at any address

    Parameters
    ----------
    matrix : Int8Matrix or Int8GroupMatrix, [..., N, K]
        The channel scales of an Int8Matrix are separate.

    Returns
    -------
    ndarray of uint8, [..., N, K] or [..., N, K + 4 ceil(K / g)]

    Examples
    --------
    >>> import numpy as np
    >>> pack_int8(Int8GroupMatrix(np.int8([[-1]]), np.float32([[1.0]])))
    array([[255,   0,   0, 128,  63]], dtype=uint8)
    """
    codes = matrix.codes.view(np.uint8)
    if isinstance(matrix, Int8Matrix):
        return codes.copy()
    scale = np.ascontiguousarray(matrix.group_scale, "<f4")
    return np.concatenate([codes, scale.view(np.uint8)], axis=-1)


@overload
def unpack_int8(rows: Bytes, channel_scale: NDArray[np.float32], num_columns: int) -> Int8Matrix: ...


@overload
def unpack_int8(
    rows: Bytes, channel_scale: None, num_columns: int, *, group_size: int = 32
) -> Int8GroupMatrix: ...


def unpack_int8(
    rows: Bytes, channel_scale: NDArray[np.float32] | None, num_columns: int, *, group_size: int = 32
) -> Int8Matrix | Int8GroupMatrix:
    """Undo `pack_int8`.

    Parameters
    ----------
    rows : ndarray of uint8, [..., N, K] or [..., N, K + 4 ceil(K / g)]
    channel_scale : ndarray of float32, [..., N], or None
        None when the rows contain the scales of groups.
    num_columns : int
        K.
    group_size : int, optional
        g, when the rows contain the scales of groups.

    Returns
    -------
    Int8Matrix, or Int8GroupMatrix when `channel_scale` is None; [..., N, K]

    Raises
    ------
    ValueError
        Rows of another length, and what the matrix refuses.
    TypeError
        Rows of another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> unpack_int8(np.uint8([[255, 0, 0, 128, 63]]), None, 1).group_scale
    array([[1.]], dtype=float32)
    """
    if channel_scale is not None:
        _check_rows(rows, num_columns)
        return Int8Matrix(rows.view(np.int8), channel_scale)
    _check_rows(rows, num_columns + 4 * num_groups(num_columns, group_size))
    scale = np.ascontiguousarray(rows[..., num_columns:]).view("<f4")
    return Int8GroupMatrix(rows[..., :num_columns].view(np.int8), scale.astype(np.float32), group_size)


def _check_rows(rows: object, num_bytes: int) -> None:
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        got = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise TypeError(f"rows: got {got}, expected an array of uint8")
    if rows.ndim < 2 or rows.shape[-1] != num_bytes:
        raise ValueError(f"rows: got shape {list(rows.shape)}, expected [..., N, {num_bytes}]")
