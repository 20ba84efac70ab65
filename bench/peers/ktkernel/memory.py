"""Where arrays lie, as kt-kernel's extension is told."""

from __future__ import annotations

import numpy as np

from ...core.layer import Array

__all__ = ["address", "aligned"]

#: It reads arrays in whole vectors; in training these must begin on a cache line.
_ALIGNMENT = 64


def address(array: Array) -> int:
    """Where an array lies."""
    return int(array.ctypes.data)


def aligned(array: Array) -> Array:
    """Copy an array to where a cache line begins."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -address(memory) % _ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
