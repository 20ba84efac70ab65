"""The parts of a decoder that have no matrices, each with its derivative: softmax, norm, rotation.

A function `f_backward` takes what `f` took or gave, and a gradient by the result of `f`; it gives that by the
first argument of `f`. The dtype is that of the arguments. Sums are ufuncs' own: for a single token, methods
of arrays take longer to call than to compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Floats",
    "cross_entropy",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "rotate_backward",
    "softmax",
    "softmax_backward",
]

Floats = NDArray[Any]  #: float32; tests of derivatives take float64 too


def softmax(x: Floats) -> Floats:
    """Give exp(x) over the sum of its last axis."""
    powers = np.exp(x - np.maximum.reduce(x, axis=-1, keepdims=True))
    result: Floats = powers / np.add.reduce(powers, axis=-1, keepdims=True)
    return result


def cross_entropy(logits: Floats, tokens: NDArray[Any]) -> tuple[NDArray[np.float64], Floats]:
    """Give -log softmax(logits)[token] of rows, and softmax(logits): the gradient but for 1 at the token."""
    at = tokens[:, None].astype(np.int64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    sums = powers.sum(axis=-1, keepdims=True)
    nats: NDArray[np.float64] = np.log(sums.astype(np.float64)) - np.take_along_axis(shifted, at, -1)
    return nats[:, 0], powers / sums


def softmax_backward(chances: Floats, grad: Floats) -> Floats:
    """Give p (grad - sum p grad), p being the result of `softmax`."""
    result: Floats = chances * (grad - (chances * grad).sum(axis=-1, keepdims=True))
    return result


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Give x / r weight, r^2 being the mean square of the last axis plus eps (Zhang and Sennrich, 2019)."""
    return x / _root(x, eps) * weight


def rms_norm_backward(x: Floats, weight: Floats, eps: float, grad: Floats) -> Floats:
    """Give g / r - x mean(g x) / r^3 with g = grad weight."""
    root, grad = _root(x, eps), grad * weight
    result: Floats = grad / root - x * (np.mean(grad * x, axis=-1, keepdims=True) / root**3)
    return result


def _root(x: Floats, eps: float) -> Floats:
    squares = np.add.reduce(x * x, axis=-1, keepdims=True)
    root: Floats = np.sqrt(squares / x.dtype.type(x.shape[-1]) + x.dtype.type(eps))
    return root


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Turn pairs (i, i + D / 2) of [..., T, D] by angles of their positions [T, D / 2] (Su et al., 2021)."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def rotate_backward(cos: Floats, sin: Floats, grad: Floats) -> Floats:
    """Turn back."""
    return rotate(grad, cos, -sin)
