"""Matrices as GPTQ packs them, eight of K in a number and N along a row, made into rows of the engine's.

Such a row is GGUF's Q4_0: of 32 weights a float16 scale, then their 4-bit codes, the first half in the low
nibbles of 16 bytes and the second half in the high ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import Array
from .conversion import convert_each
from .gguf import GGUF_FORMATS

__all__ = ["BLOCK_BYTES", "BLOCK_SIZE", "first_not_float16", "group_sizes", "q4_0_rows"]

#: Weights and bytes of a block of Q4_0.
BLOCK_SIZE, BLOCK_BYTES = GGUF_FORMATS["q4_0"].block, GGUF_FORMATS["q4_0"].block_bytes

_BLOCK = np.dtype([("scale", "<f2"), ("first", "<u8"), ("last", "<u8")])

#: Moving half of what is left together up by so many bits, then taking what moved away from where it was.
_SPREADING = tuple(
    (np.uint64(shift), np.uint64(mask))
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F))
)


def group_sizes(num_columns: int) -> dict[int, int]:
    """The group sizes that a matrix may have, by the number of groups that K is cut into.

    A power of two from 32 on, the last group maybe in part, or all of K: no two of these make as many groups,
    so that the number tells them.

    Examples
    --------
    >>> group_sizes(704)
    {22: 32, 11: 64, 6: 128, 3: 256, 2: 512, 1: 704}
    """
    sizes = {}
    size = BLOCK_SIZE
    while size < num_columns:
        sizes[-(-num_columns // size)] = size
        size *= 2
    return {**sizes, 1: num_columns}


def first_not_float16(scale: Array) -> float | None:
    """The first of these numbers that float16 does not have; None when it has them all.

    Examples
    --------
    >>> import ml_dtypes
    >>> first_not_float16(np.array([1.5, 2.0**20], ml_dtypes.bfloat16))
    1048576.0
    """
    if scale.dtype == np.float16:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = scale.astype(np.float32).reshape(-1)
        back = numbers.astype(np.float16).astype(np.float32)
    changed = (back != numbers) & ~np.isnan(numbers)
    return float(numbers[np.argmax(changed)]) if changed.any() else None


def q4_0_rows(qweight: Sequence[Array] | Array, scale: Sequence[Array] | Array) -> NDArray[np.uint8]:
    """Convert the matrices of experts. Every product of code and scale stays what it was.

    Parameters
    ----------
    qweight : E arrays of int32 [K / 8, N]
        Bits 4 j to 4 j + 3 of [r, n] are the code of column 8 r + j of row n, for a weight of (code - 8)
        times its scale. K must be a multiple of 32.
    scale : E arrays of float16 [G, N], or of numbers that float16 has
        `group_sizes` tells the groups by their number.

    Returns
    -------
    ndarray of uint8 [E, N, K / 32 * 18]

    Examples
    --------
    >>> qweight = np.array([[0x76543210], [0], [-1], [0]], np.int32)
    >>> q4_0_rows([qweight], [np.ones((1, 1), np.float16)]).tobytes().hex(" ")
    '00 3c f0 f1 f2 f3 f4 f5 f6 f7 00 00 00 00 00 00 00 00'
    """
    num_words, num_rows = qweight[0].shape
    num_blocks = num_words * 8 // BLOCK_SIZE
    rows = np.empty((len(qweight), num_rows, num_blocks * BLOCK_BYTES), np.uint8)
    convert_each(_convert, qweight, scale, rows)
    return rows


def _convert(qweight: Array, scale: Array, rows: NDArray[np.uint8]) -> None:
    """Write one matrix's rows."""
    num_words, num_rows = qweight.shape
    size = group_sizes(num_words * 8)[len(scale)]
    words = qweight.astype("<i4", copy=False).view("<u4").reshape(-1, 4, num_rows)
    codes = _spread(words[:, :2]) | (_spread(words[:, 2:]) << np.uint64(4))
    blocks = rows.view(_BLOCK)
    blocks["scale"] = np.repeat(scale.astype("<f2"), size // BLOCK_SIZE, axis=0)[: len(words)].T
    blocks["first"] = codes[:, 0].T
    blocks["last"] = codes[:, 1].T


def _spread(words: Array) -> NDArray[np.uint64]:
    """Give each of the eight nibbles of a word a byte of its own."""
    spread = words.astype(np.uint64)
    for shift, mask in _SPREADING:
        spread |= spread << shift
        spread &= mask
    return spread
