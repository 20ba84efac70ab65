"""The weights of a benched layer, and of its adapters, in memory that all backends' processes share."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
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
    """bf16 weights [E, N, K] and float32 biases [E, N] (None where the model has none) of one layer.

    A shape with a rank R has adapters too, bf16: gate_lora_a, up_lora_a [E, R, H]; gate_lora_b, up_lora_b
    [E, I, R]; down_lora_a [E, R, I]; down_lora_b [E, H, R].
    """

    shape: Shape
    fd: int  #: the memory, for `attach` in another process
    gate: Array
    up: Array
    down: Array
    gate_bias: Array | None
    up_bias: Array | None
    down_bias: Array | None
    lora: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def create(cls, shape: Shape, seed: int = 0) -> Layer:
        """Draw a layer into new shared memory."""
        fd = os.memfd_create("layer", 0)
        os.ftruncate(fd, _num_bytes(shape))
        layer = cls.attach(shape, fd)
        rng = np.random.default_rng(seed)
        for weights in (layer.gate, layer.up, layer.down):
            _draw(weights, 1.0, rng)
        for bias in (layer.gate_bias, layer.up_bias, layer.down_bias):
            if bias is not None:
                bias[:] = rng.standard_normal(bias.shape, np.float32) * np.float32(0.1)
        for name, weights in layer.lora.items():
            # What adapters add is half as large as what they are added to: neither hides the other's errors.
            _draw(weights, 0.5 * shape.rank / shape.alpha if name.endswith("_b") else 1.0, rng)
        return layer

    @classmethod
    def attach(cls, shape: Shape, fd: int) -> Layer:
        """See the memory `fd` as a layer of that shape; its pages are brought in at once."""
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(fd, _num_bytes(shape), flags, mmap.PROT_READ | mmap.PROT_WRITE)
        arrays: dict[str, Any] = {}
        offset = 0
        for name, (part, dtype) in _parts(shape).items():
            size = int(np.prod(part))
            arrays[name] = np.frombuffer(memory, dtype, size, offset).reshape(part)
            offset += size * dtype.itemsize
        lora = {name: arrays.pop(name) for name in list(arrays) if "_lora_" in name}
        biases: dict[str, Any] = dict.fromkeys(("gate_bias", "up_bias", "down_bias"))
        return cls(shape, fd, **(biases | arrays), lora=lora)

    def close(self) -> None:
        """Let go of the memory; it is freed when the last process has done so and the arrays are gone."""
        os.close(self.fd)


def _parts(shape: Shape) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of the arrays, one behind the other; all sizes keep the next one aligned."""
    num, rank = shape.experts, shape.rank
    parts: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    sizes = {
        "gate": (shape.inter, shape.hidden),
        "up": (shape.inter, shape.hidden),
        "down": (shape.hidden, shape.inter),
    }
    for name, (rows, columns) in sizes.items():
        parts[name] = (num, rows, columns), bfloat16
    if shape.biased:
        for name, (rows, _) in sizes.items():
            parts[f"{name}_bias"] = (num, rows), np.dtype(np.float32)
    if rank:
        for name, (rows, columns) in sizes.items():
            parts[f"{name}_lora_a"] = (num, rank, columns), bfloat16
            parts[f"{name}_lora_b"] = (num, rows, rank), bfloat16
    return parts


def _num_bytes(shape: Shape) -> int:
    return sum(int(np.prod(part)) * dtype.itemsize for part, dtype in _parts(shape).values())


def _draw(weights: Array, scale: float, rng: np.random.Generator) -> None:
    """Draw matrices whose product with a Gaussian vector has about the standard deviation `scale`."""
    pool = rng.standard_normal(_POOL, np.float32) * np.float32(scale / weights.shape[2] ** 0.5)
    _fill(weights.view(np.uint16), pool.astype(bfloat16).view(np.uint16), rng)


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
