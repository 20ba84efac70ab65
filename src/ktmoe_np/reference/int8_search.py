"""The search of `quantize_int8` for a scale, on groups [R, G, g] of finite float32 numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .activation import round_bf16
from .int4_search import LANES, LARGEST_BF16, lane_sum, normalizer

__all__ = ["int8_groups"]

Floats = NDArray[np.float32]

#: The scales tried are amax over these. 127 comes first, as it gives back what is a whole number of steps.
#: The others put the largest of a group a quarter of a step from a code: a half would cost more than another
#: choice for the rest of the group gains, and so does clipping, with a scale below amax / 127.5.
_STEPS = (np.float32(127), *(np.float32(127.25 - 0.5 * i) for i in range(15)))
#: No code times this is beyond the largest bfloat16.
_LARGEST_SCALE = LARGEST_BF16 / np.float32(127)


def int8_groups(w: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Quantize groups [R, G, g], none of the sizes 0, to codes [R, G, g] and scales [R, G]."""
    amax = np.abs(w).max(axis=2)
    power = normalizer(amax)
    with np.errstate(under="ignore"):
        v = np.pad(w * power[..., None], ((0, 0), (0, 0), (0, -w.shape[2] % LANES)))
        best, scale = np.full(amax.shape, np.inf, np.float32), np.zeros_like(amax)
        for steps in _STEPS:
            tried = np.minimum(amax / steps, _LARGEST_SCALE)
            step = tried * power
            decoded = round_bf16(_codes(v, step) * step[..., None])
            error = lane_sum(np.square(v - decoded))
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, tried, scale)
        codes = _codes(v, scale * power)[..., : w.shape[2]]
    return codes.astype(np.int8), scale


def _codes(v: Floats, step: Floats) -> Floats:
    """Nearest multiples of the steps [R, G]; 0 for a step of 0."""
    reciprocal = np.where(step > 0, np.float32(1) / np.where(step > 0, step, np.float32(1)), np.float32(0))
    codes: Floats = np.clip(np.rint(v * reciprocal[..., None]), -127, 127)
    return codes
