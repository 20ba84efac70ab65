"""From weights and activations to integers and scales, to the bit.

Everything is a fixed sequence of float32 operations, none of them fused, each rounded to nearest even, and
denormal numbers are what they are. So another implementation gets the same bytes.
"""

from __future__ import annotations

from typing import Any, overload

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .int4_search import int4_rows
from .int8_search import int8_groups
from .quantized import Int4Matrix, Int8GroupMatrix, Int8Matrix, check_int4_group_size, num_groups

__all__ = ["quantize_activations", "quantize_int4", "quantize_int8"]

#: Elements quantized at once: what fits a cache.
_BLOCK = 1 << 18

_WEIGHT_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))


@overload
def quantize_int8(weights: NDArray[Any], *, group_size: None = None, name: str = ...) -> Int8Matrix: ...


@overload
def quantize_int8(weights: NDArray[Any], *, group_size: int, name: str = ...) -> Int8GroupMatrix: ...


def quantize_int8(
    weights: NDArray[Any], *, group_size: int | None = None, name: str = "weights"
) -> Int8Matrix | Int8GroupMatrix:
    """Round each row to multiples of amax / 127, or each group of a row to those of a searched scale.

    A row::

        scale = amax / 127                                  one float32 division
        code = rint(w / scale), clipped to [-127, 127]      one float32 division, ties to even

    A row of zeros has scale 0 and codes 0; so has one whose amax / 127 is 0 in float32.

    A group, with `group_size`, gets the scale with the least squared error of the decoded weights
    bf(code * scale), in these steps, all in float32 and none fused. Sums go over 16 lanes: lane j adds the
    columns 16 i + j of the group from i = 0 on, then lanes j and j + 8 are added, j and j + 4, j and j + 2,
    j and j + 1. A group counts as filled up with zeros to whole lanes.

    1. v = w * 2^p, with amax of v in [2, 4). p is at most 127, so an amax below 2^-126 comes out smaller.
    2. The scales amax / d are tried for d = 127, 127.25, 126.75, 126.25, and so on by halves down to 120.25,
       none above the largest bfloat16 / 127, so that no decoded weight overflows::

           s = min(amax / d, largest bfloat16 / 127)      step = s * 2^p, which is exact
           q = clip(rint(v * (1 / step)), -127, 127)      0 when step is 0
           error = sum of (v - bf(q * step))^2

    3. The first s with the least error is the scale, its q are the codes.

    So a group of zeros has scale 0 and codes 0. A group of code * scale comes back with those codes and that
    scale when its largest ``|code|`` is 127, the scale has at most 17 significant bits and no weight is
    beyond the largest bfloat16: then bf(code * scale) is the bfloat16 nearest to a weight, and nothing has a
    smaller error.

    Parameters
    ----------
    weights : ndarray of bfloat16, float16 or float32, [..., N, K]
        Most often [E, N, K].
    group_size : int, optional
        With it, a scale for every so many columns; the last group of a row may be short. 32 is what the
        engine knows.
    name : str, optional
        What messages call the weights.

    Returns
    -------
    Int8Matrix, or Int8GroupMatrix with a `group_size`

    Raises
    ------
    ValueError
        A weight that is not finite, with its expert and row; fewer than two axes; a group size below 1.
    TypeError
        Not an array, or another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = quantize_int8(np.float32([[2.54, -1.0, 0.01]]))
    >>> matrix.codes, matrix.channel_scale
    (array([[127, -50,   0]], dtype=int8), array([0.02], dtype=float32))
    >>> quantize_int8(np.float32([[2.54, -1.0, 0.01]]), group_size=2).codes
    array([[127, -50, 127]], dtype=int8)
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size: got {group_size}, expected at least 1")
    rows = _finite_rows(name, weights)
    num_columns = weights.shape[-1]
    size = max(num_columns, 1) if group_size is None else group_size
    groups = num_groups(num_columns, size)
    codes = np.zeros(rows.shape, np.int8)
    scale = np.zeros((len(rows), groups), np.float32)
    quantize = _int8 if group_size is None else int8_groups
    if num_columns:
        for part in _blocks(rows):
            block_codes, scale[part] = quantize(_grouped(rows[part], size))
            codes[part] = block_codes.reshape(len(block_codes), -1)[:, :num_columns]
    codes = codes.reshape(weights.shape)
    if group_size is None:
        channel_scale = scale[:, 0] if groups else np.zeros(len(rows), np.float32)
        return Int8Matrix(codes, channel_scale.reshape(weights.shape[:-1]))
    return Int8GroupMatrix(codes, scale.reshape(*weights.shape[:-1], groups), group_size)


def quantize_int4(weights: NDArray[Any], *, group_size: int = 32, name: str = "weights") -> Int4Matrix:
    """Find channel_scale, m and q with a small squared error of channel_scale * m * q.

    Each row on its own, in these steps, all in float32 and none fused. Sums go over 16 lanes: lane j adds the
    columns 16 i + j from i = 0 on, then lanes j and j + 8 are added, j and j + 4, j and j + 2, j and j + 1. A
    short last group counts as filled up with zeros.

    1. v = w * 2^p, with amax of v in [2, 4). p is at most 127, so an amax below 2^-126 comes out smaller.
    2. Two scales are tried: s = amax / 128, and s = u / 32, with u the largest power of two that divides
       every rint(32 v) of the row (1 when all of them are 0).
    3. Under each, every group gets its m. With high = max(v) and low = max(-v) of the group, sign = -1 if
       high > low else 1 (so that the largest goes to -8, not to 7) and
       b = rint(max(high, low) / (s * 8.25)), the candidates are m = sign * clip(b + o, 1, 15) for
       o = -1, 0, 1, 2. The first with the least error stays::

           t = v * (1 / (s * m))      q = clip(rint(t), -8, 7)      error = (sum of (t - q)^2) * (m * m)

    4. The second scale replaces the first when its (s * s) * (sum of errors, group after group) is smaller.
    5. q as in step 3, and with c = m * q the scale of least squares: s = (sum of v * c) / (sum of c * c),
       both sums over the row.
    6. ``channel_scale = min(s / 2^p, largest bfloat16 / max |c|)``, so that no decoded weight overflows.

    A row of zeros has channel_scale 0, m = 1, q = 0.

    A row comes back exactly when its amax is at least 2^-126, the largest power of two that divides all its
    weights, u, is at least 2^(floor(log2 amax) - 6), and each of its groups is either at most 7 u in
    magnitude, or u * m * q with ``|m| <= 15``, q in [-8, 7] and the largest ``|q|`` 7 or 8. In particular
    every row of c * q does, with c a power of two and q in [-8, 7].

    Parameters
    ----------
    weights : ndarray of bfloat16, float16 or float32, [..., N, K]
        Most often [E, N, K].
    group_size : int, optional
        32, 64 or 128 columns share an m; the last group of a row may be short.
    name : str, optional
        What messages call the weights.

    Returns
    -------
    Int4Matrix

    Raises
    ------
    ValueError
        A weight that is not finite, with its expert and row; fewer than two axes; another group size.
    TypeError
        Not an array, or another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = quantize_int4(np.float32([[0.5, -1.0, 3.5, 0.0]]))
    >>> matrix.channel_scale, matrix.multiplier, matrix.q
    (array([0.5], dtype=float32), array([[-1]], dtype=int8), array([[-1,  2, -7,  0]], dtype=int8))
    """
    check_int4_group_size(group_size)
    rows = _finite_rows(name, weights)
    num_columns = weights.shape[-1]
    groups = num_groups(num_columns, group_size)
    q, m = np.zeros(rows.shape, np.int8), np.ones((len(rows), groups), np.int8)
    channel_scale = np.zeros(len(rows), np.float32)
    if num_columns:
        for part in _blocks(rows):
            block_q, m[part], channel_scale[part] = int4_rows(_grouped(rows[part], group_size))
            q[part] = block_q.reshape(len(block_q), -1)[:, :num_columns]
    return Int4Matrix(
        q.reshape(weights.shape),
        m.reshape(*weights.shape[:-1], groups),
        channel_scale.reshape(weights.shape[:-1]),
        group_size,
    )


def quantize_activations(
    x: NDArray[Any], block: int | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round rows of activations, or blocks of them, to multiples of a scale amax / 127, as `quantize_int8`.

    Parameters
    ----------
    x : ndarray of a float dtype, [M, K]
        Numbers that bfloat16 represents.
    block : int, optional
        A scale for every so many columns, of which the last may be fewer; without it, one for a row.

    Returns
    -------
    codes : ndarray of int8, [M, K]
        0 in a row or block of zeros, and in one with a NaN or an infinity.
    scale : ndarray of float32, [M] or [M, ceil(K / block)]
        0 for zeros; NaN for a row or block with a NaN or an infinity, which makes its results NaN.

    Raises
    ------
    ValueError
        A block below 1.

    Examples
    --------
    >>> import numpy as np
    >>> codes, scale = quantize_activations(np.float32([[1, -2], [np.inf, 1]]))
    >>> codes, scale
    (array([[  64, -127],
           [   0,    0]], dtype=int8), array([0.01574803,        nan], dtype=float32))
    >>> quantize_activations(np.float32([[1, -2, 127]]), block=2)
    (array([[  64, -127,  127]], dtype=int8), array([[0.01574803, 1.        ]], dtype=float32))
    """
    if block is not None and block < 1:
        raise ValueError(f"block: got {block}, expected at least 1")
    values = x.astype(np.float32)
    grouped = values[:, None] if block is None else _grouped(values, block)
    finite = np.asarray(np.isfinite(grouped).all(axis=2))
    codes, scale = _int8(np.where(finite[..., None], grouped, np.float32(0)))
    scale = np.where(finite, scale, np.float32(np.nan))
    codes = codes.reshape(len(x), -1)[:, : x.shape[1]] if x.size else np.zeros(x.shape, np.int8)
    return codes, scale[:, 0] if block is None else scale


def _int8(w: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [R, G, g] and scales [R, G] of groups [R, G, g] of finite numbers."""
    with np.errstate(under="ignore"):
        scale = np.abs(w).max(axis=2, initial=np.float32(0)) / np.float32(127)
        divisor = np.where(scale > 0, scale, np.float32(np.inf))
        codes = np.clip(np.rint(w / divisor[..., None]), -127, 127)
    return codes.astype(np.int8), scale


def _finite_rows(name: str, weights: NDArray[Any]) -> NDArray[Any]:
    """Check the weights and return them as rows [R, K]."""
    if not isinstance(weights, np.ndarray):
        raise TypeError(f"{name}: got {type(weights).__name__}, expected a NumPy array")
    if weights.dtype not in _WEIGHT_DTYPES:
        names = " or ".join(dtype.name for dtype in _WEIGHT_DTYPES)
        raise TypeError(f"{name}: got {weights.dtype}, expected {names}")
    if weights.ndim < 2:
        raise ValueError(f"{name}: got shape {list(weights.shape)}, expected [..., N, K]")
    rows = weights.reshape(int(np.prod(weights.shape[:-1])), weights.shape[-1])
    for part in _blocks(rows):
        values = rows[part].astype(np.float32)
        wrong = ~np.asarray(np.isfinite(values).all(axis=1))
        if wrong.any():
            row = int(np.argmax(wrong))
            kind = "NaN" if np.isnan(values[row]).any() else "an infinity"
            at = np.unravel_index(part.start + row, weights.shape[:-1])
            place = "".join(f"expert {e}, " for e in at[:-1]) + f"row {at[-1]}"
            raise ValueError(f"{name}: {place}: got {kind}, expected finite weights")
    return rows


def _blocks(rows: NDArray[Any]) -> list[slice]:
    """Cut rows [R, K] into pieces of a size that a cache holds."""
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _grouped(rows: NDArray[Any], group_size: int) -> NDArray[np.float32]:
    """Rows [R, K] as float32 groups [R, G, g], the last one filled up with zeros."""
    missing = -rows.shape[1] % group_size
    padded = np.pad(rows.astype(np.float32), ((0, 0), (0, missing)))
    return padded.reshape(len(rows), padded.shape[1] // group_size, group_size)
