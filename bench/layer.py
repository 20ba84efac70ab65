"""The weights of a benched layer, in memory that all contenders' processes share."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .shapes import Shape

__all__ = ["Array", "Layer", "to_float32"]

Array = NDArray[Any]

bfloat16 = np.dtype(ml_dtypes.bfloat16)

#: Random values drawn; every matrix is a window of them that begins elsewhere. No multiple of any K.
_POOL = 5_000_011


@dataclass(frozen=True, eq=False)
class Layer:
    """bf16 weights [E, N, K] and float32 biases [E, N] (None where the model has none) of one layer."""

    shape: Shape
    fd: int  #: the memory, for `attach` in another process
    gate: Array
    up: Array
    down: Array
    gate_bias: Array | None
    up_bias: Array | None
    down_bias: Array | None

    @classmethod
    def create(cls, shape: Shape, seed: int = 0) -> Layer:
        """Draw a layer into new shared memory."""
        fd = os.memfd_create("layer", 0)
        os.ftruncate(fd, _num_bytes(shape))
        layer = cls.attach(shape, fd)
        rng = np.random.default_rng(seed)
        for weights in (layer.gate, layer.up, layer.down):
            pool = rng.standard_normal(_POOL, np.float32) / np.float32(weights.shape[2] ** 0.5)
            _fill(weights.view(np.uint16), pool.astype(bfloat16).view(np.uint16), rng)
        for bias in (layer.gate_bias, layer.up_bias, layer.down_bias):
            if bias is not None:
                bias[:] = rng.standard_normal(bias.shape, np.float32) * np.float32(0.1)
        return layer

    @classmethod
    def attach(cls, shape: Shape, fd: int) -> Layer:
        """See the memory `fd` as a layer of that shape; its pages are brought in at once."""
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(fd, _num_bytes(shape), flags, mmap.PROT_READ | mmap.PROT_WRITE)
        arrays: list[Array | None] = []
        offset = 0
        for part, dtype in _parts(shape):
            size = int(np.prod(part))
            arrays.append(np.frombuffer(memory, dtype, size, offset).reshape(part))
            offset += size * dtype.itemsize
        arrays += [None] * (6 - len(arrays))
        return cls(shape, fd, *arrays)  # type: ignore[arg-type]  # the first three are always there

    def close(self) -> None:
        """Let go of the memory; it is freed when the last process has done so and the arrays are gone."""
        os.close(self.fd)


def _parts(shape: Shape) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of the arrays, one behind the other; all sizes keep the next one aligned."""
    num, inter, hidden = shape.experts, shape.inter, shape.hidden
    parts: list[tuple[tuple[int, ...], np.dtype[Any]]] = [
        ((num, inter, hidden), bfloat16),
        ((num, inter, hidden), bfloat16),
        ((num, hidden, inter), bfloat16),
    ]
    if shape.biased:
        parts += [((num, width), np.dtype(np.float32)) for width in (inter, inter, hidden)]
    return parts


def _num_bytes(shape: Shape) -> int:
    return sum(int(np.prod(part)) * dtype.itemsize for part, dtype in _parts(shape))


def _fill(weights: Array, pool: Array, rng: np.random.Generator) -> None:
    """Fill each expert's matrix with the pool, from a place of its own on and round and round."""
    for matrix in weights.reshape(len(weights), -1):
        start = int(rng.integers(len(pool)))
        at = 0
        while at < len(matrix):
            count = min(len(matrix) - at, len(pool) - start)
            matrix[at : at + count] = pool[start : start + count]
            at, start = at + count, 0


def to_float32(values: Array) -> Array:
    """Widen bf16, by a shift: faster than a cast."""
    wide = values.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
