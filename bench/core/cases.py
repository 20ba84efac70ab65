"""Inputs of a timed call: hidden states and routing. The same seed gives the same cases in every process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .layer import Array, bfloat16
from .shapes import Shape

__all__ = ["Case", "make_cases", "num_touched"]


class Case(NamedTuple):
    """What one call is given."""

    x: Array  # bf16 [T, H]
    ids: Array  # int64 [T, P], the experts of a token all different
    weights: Array  # float32 [T, P], summing to 1
    grad: Array | None = None  # bf16 [T, H], the gradient of the output; where there are adapters to train


def make_cases(shape: Shape, tokens: int, seed: int = 1) -> list[Case]:
    """Make cases to rotate among: 64 when decoding, so that no call finds its experts cached; at least 4."""
    count = max(4, min(64, 1024 // max(tokens, 1)))
    return [_make_case(shape, tokens, [seed, tokens, i]) for i in range(count)]


def _make_case(shape: Shape, tokens: int, seed: list[int]) -> Case:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, shape.hidden), np.float32).astype(bfloat16)
    if shape.per_token < shape.experts:
        draw = rng.random((tokens, shape.experts), np.float32)
        ids = np.argpartition(draw, shape.per_token, axis=1)[:, : shape.per_token]
    else:
        ids = np.tile(np.arange(shape.experts), (tokens, 1))
    weights = rng.random((tokens, shape.per_token), np.float32) + np.float32(0.1)
    weights /= weights.sum(axis=1, keepdims=True)
    grad = None
    if shape.rank:
        grad = rng.standard_normal((tokens, shape.hidden), np.float32).astype(bfloat16)
    return Case(x, np.ascontiguousarray(ids, np.int64), weights, grad)


def num_touched(cases: list[Case]) -> float:
    """Different experts of a call, on average over the cases."""
    return float(np.mean([len(np.unique(case.ids)) for case in cases]))
