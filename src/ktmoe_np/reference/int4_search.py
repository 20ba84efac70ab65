"""The search of `quantize_int4`, on rows in groups [R, G, g] of finite float32 numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["int4_rows"]

Floats = NDArray[np.float32]

#: The first scale that is tried is amax / 128: m * q reaches 120, and clipping the largest a little pays.
_STEPS = np.float32(128)
#: A group's candidates surround extreme / (s * 8.25): with these offsets they hold every m whose largest
#: |q| is 7 or 8.
_CENTER, _OFFSETS = np.float32(8.25), (-1, 0, 1, 2)
#: The finest power of two tried as a scale, when the row's largest is in [2, 4).
_FINEST = np.float32(1 / 32)
LARGEST_BF16 = np.float32(2.0**128 - 2.0**120)
_ONE = np.float32(1)
LANES = 16


def int4_rows(w: Floats) -> tuple[NDArray[np.int8], NDArray[np.int8], Floats]:
    """Quantize groups [R, G, g] to q [R, G, g], m [R, G] and channel_scale [R]; see `quantize_int4`."""
    amax = np.abs(w).max(axis=(1, 2))
    power = normalizer(amax)
    with np.errstate(under="ignore", divide="ignore", invalid="ignore"):
        v = w * power[:, None, None]
        # A row of zeros may have any scale.
        first = np.where(amax > 0, amax * power / _STEPS, _ONE)
        error, m = _multipliers(v, first)
        second = _common_power(v)
        other_error, other_m = _multipliers(v, second)
        better = other_error < error
        s, m = np.where(better, second, first), np.where(better[:, None], other_m, m)
        q = _codes(v * _reciprocal(s, m))
        c = m[..., None] * q
        largest = np.abs(c).max(axis=(1, 2))
        s = _row_sum(v * c) / _row_sum(c * c)
        channel_scale = np.minimum(s / power, LARGEST_BF16 / largest)
    channel_scale = np.where(amax > 0, channel_scale, np.float32(0))
    return q.astype(np.int8), m.astype(np.int8), channel_scale


def normalizer(amax: Floats) -> Floats:
    """Return 2^p, p <= 127, with amax * 2^p in [2, 4); its exponent field is 255 - that of amax."""
    exponent = amax.view(np.int32) >> 23
    power: Floats = (np.minimum(255 - exponent, 254) << 23).view(np.float32)
    return power


def _common_power(v: Floats) -> Floats:
    """Return the largest power of two that divides every rint(32 v) of a row, over 32, [R]."""
    whole = np.rint(v / _FINEST).astype(np.int32).reshape(len(v), -1)
    every = np.bitwise_or.reduce(whole, axis=1)
    power: Floats = np.maximum(every & -every, 1).astype(np.float32) * _FINEST
    return power


def _multipliers(v: Floats, s: Floats) -> tuple[Floats, Floats]:
    """Return the squared error of the rows [R], and m [R, G], with the scales s [R]."""
    high, low = v.max(axis=2), (-v).max(axis=2)
    sign = np.where(high > low, -_ONE, _ONE)
    middle = np.rint(np.maximum(high, low) / (s * _CENTER)[:, None])
    best, chosen = np.full(high.shape, np.inf, np.float32), sign
    for offset in _OFFSETS:
        m = sign * np.clip(middle + np.float32(offset), 1, 15)
        t = v * _reciprocal(s, m)
        error = lane_sum(np.square(t - _codes(t))) * (m * m)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, m, chosen)
    total = np.zeros(len(v), np.float32)
    for group in range(v.shape[1]):
        total += best[:, group]
    return s * s * total, chosen


def _reciprocal(s: Floats, m: Floats) -> Floats:
    """Compute 1 / (s * m), [R, G, 1]."""
    return (_ONE / (s[:, None] * m))[..., None]


def _codes(t: Floats) -> Floats:
    return np.clip(np.rint(t), -8, 7)


def _row_sum(x: Floats) -> Floats:
    """Sum rows [R, G, g] in the lanes of the columns."""
    return lane_sum(x.reshape(len(x), -1))


def lane_sum(x: NDArray[Any]) -> Floats:
    """Sum over the last axis: column i goes to lane i mod 16, and lanes are added by halves."""
    blocks = x.reshape(*x.shape[:-1], -1, LANES)
    lanes = blocks[..., 0, :].copy()
    for i in range(1, blocks.shape[-2]):
        lanes += blocks[..., i, :]
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    total: Floats = lanes[..., 0]
    return total
