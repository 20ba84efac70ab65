"""Effects of the roundings of an evaluation on products and activations, as centers and radii."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import ActivationSpec
from .activation import FUNCTIONS, Array, gate_factor, up_factor
from .inputs import AnyArray
from .int8_activations import pieces
from .integer_matrix import IntegerMatrix
from .quantize import quantize_activations
from .weights import ExpertWeights

__all__ = ["EPS", "TINY", "Rounding", "in_range"]

#: Unit roundoff of float32.
EPS = 2.0**-24

#: Smallest normal float32: hardware may take anything below it for zero.
TINY = 2.0**-126

_LARGEST = float(np.finfo(np.float32).max)


def in_range(magnitude: Array, num_roundings: int) -> NDArray[np.bool_]:
    """Whether no partial sum can overflow float32, of terms whose magnitudes add up to `magnitude`.

    Holds for every order of summation: no partial sum is larger than all magnitudes together, and each of its
    roundings makes it larger by a factor of at most 1 + EPS. NaN is out of range.
    """
    within: NDArray[np.bool_] = magnitude < _LARGEST * (1.0 - num_roundings * EPS)
    return within


class _Sums(NamedTuple):
    """Products x . W^T, all [M, N], before channel scales, biases and the last roundings."""

    center: Array
    magnitude: Array  #: sum of the magnitudes of the terms
    radius: Array
    reach: Array  #: what no partial result exceeds, but for its roundings
    num_roundings: int


@dataclass(frozen=True)
class Rounding:
    """Assumptions about the roundings of an evaluation; the parameters are those of `error_bound`."""

    max_chain: int | None
    sigmas: float | None
    activation_ulps: float

    def __post_init__(self) -> None:
        if self.max_chain is not None and self.max_chain < 1:
            raise ValueError(f"max_chain: got {self.max_chain}, expected at least 1")
        if self.sigmas is not None and not self.sigmas > 0:
            raise ValueError(f"sigmas: got {self.sigmas}, expected above 0")

    def gamma(self, n: int) -> float:
        """Relative error of n roundings in a row."""
        if self.sigmas is not None:
            return self.sigmas * math.sqrt(n) * EPS
        return n * EPS / (1.0 - n * EPS)

    def product(
        self, x: Array, dx: Array | None, weights: ExpertWeights, bias: AnyArray | None
    ) -> tuple[Array, Array]:
        """Center and radius of x . W^T + bias for x with radius dx: [M, K] and [N, K] to [M, N]."""
        center, magnitude, radius, reach, num_roundings = self._sums(x, dx, weights)
        num_roundings += 1
        if weights.sum_scale is not None:
            scale = weights.sum_scale.astype(np.float64)
            # A scale below the normal numbers may be taken for zero.
            flushed = TINY * (magnitude + radius + 1.0)
            size = np.abs(scale)
            center, magnitude, radius = center * scale, magnitude * size, radius * size + flushed
            reach = reach * np.maximum(size, 1.0)
            num_roundings += 1
        if bias is not None:
            center = center + bias.astype(np.float64)
            magnitude = magnitude + np.abs(bias.astype(np.float64))
            reach = reach + np.abs(bias.astype(np.float64))
        radius = radius + self.gamma(num_roundings) * (magnitude + radius)
        finite = in_range(np.maximum(reach, magnitude + radius), weights.shape[1] + 3)
        return center, np.where(finite, radius, np.inf)

    def _sums(self, x: Array, dx: Array | None, weights: ExpertWeights) -> _Sums:
        if weights.integers is not None:
            return self._block_sums(x, dx, weights.integers)
        sums = self._integer_sums if weights.integer else self._float_sums
        return sums(x, dx, weights.values.astype(np.float64))

    def _float_sums(self, x: Array, dx: Array | None, w: Array) -> _Sums:
        abs_x, abs_w = np.abs(x), np.abs(w)
        radius = TINY * (abs_w.sum(axis=1) + abs_x.sum(axis=1, keepdims=True) + w.shape[1])
        magnitude = reach = abs_x @ abs_w.T
        if dx is not None:
            radius = radius + self._carried(dx, abs_w)
            reach = (abs_x + dx) @ abs_w.T
        return _Sums(x @ w.T, magnitude, radius, reach, min(w.shape[1], self.max_chain or w.shape[1]))

    def _integer_sums(self, x: Array, dx: Array | None, w: Array) -> _Sums:
        """Sums of int8 codes of x, which are exact, but dx may change codes and scale."""
        codes, d_codes, scale, d_scale = _code_intervals(x, dx)
        sums = codes @ w.T
        d_sums = np.zeros_like(sums) if dx is None else self._carried(d_codes, np.abs(w))
        # When the scale grows, codes shrink with it. Twice the first term, as that part of the second is no
        # independent error.
        radius = 2.0 * d_scale * np.abs(sums) + (scale + d_scale) * d_sums
        # A row of denormal numbers, or with a denormal scale, may be taken for zero.
        flushed = TINY * (np.abs(sums) + d_sums + 1.0 + 128.0 * np.abs(w).sum(axis=1))
        # Scales may act in any order, also on each other.
        largest = (np.abs(codes) + d_codes) @ np.abs(w).T
        reach = np.maximum(largest, 1.0) * np.maximum(scale + d_scale, 1.0)
        return _Sums(sums * scale, np.abs(sums) * scale, radius + flushed, reach, 2)

    def _block_sums(self, x: Array, dx: Array | None, matrix: IntegerMatrix) -> _Sums:
        """Sums of blocks of int8 codes of x, exact in each group, but dx may change codes and scales."""
        w, abs_w, abs_integers = matrix.values(np.float64), matrix.magnitudes(), matrix.integer_magnitudes()
        decoded, d_x, radius = np.zeros_like(x), np.zeros_like(x), np.zeros((len(x), len(w)))
        largest, size = np.zeros((len(x), 1)), matrix.activation_block
        for start in range(0, x.shape[1], size):
            part = slice(start, start + size)
            codes, d_codes, scale, d_scale = _code_intervals(x[:, part], None if dx is None else dx[:, part])
            decoded[:, part], d_x[:, part] = codes * scale, d_codes * (scale + d_scale)
            # When the scale grows, codes shrink with it. Twice, as that part of d_x is no independent error.
            radius += 2.0 * d_scale * np.abs(codes @ w[:, part].T)
            largest = np.maximum(largest, scale + d_scale)
        radius = radius + self._carried(d_x, abs_w)
        abs_x, steps = np.abs(decoded) + d_x, 2 * sum(1 for _ in pieces(matrix))
        # Scales of blocks, of groups, and products of both are taken for zero where they are denormal.
        flushed = abs_x @ abs_integers.T + 128.0 * (abs_w + abs_integers).sum(axis=1) + steps
        reach = np.maximum(abs_x @ abs_w.T, largest * matrix.largest_scales())
        return _Sums(decoded @ w.T, np.abs(decoded) @ abs_w.T, radius + TINY * flushed, reach, steps + 2)

    def _carried(self, dx: Array, abs_w: Array) -> Array:
        """Error of x . W^T from errors dx of x."""
        worst: Array = dx @ abs_w.T
        if self.sigmas is None:
            return worst
        typical: Array = np.sqrt(np.square(dx) @ np.square(abs_w).T)
        smaller: Array = np.minimum(worst, self.sigmas * typical)
        return smaller

    def gate_factor(self, spec: ActivationSpec, g: Array, dg: Array) -> tuple[Array, Array]:
        """Center and radius of the factor of the activation that depends on the gate."""
        a = gate_factor(spec, g)
        da = np.maximum(np.abs(gate_factor(spec, g + dg) - a), np.abs(gate_factor(spec, g - dg) - a))
        # The function may turn between the ends of the interval. |A''| is at most alpha / 2 (silu and its
        # kin), 0.8 (gelu) or 1 + 1 / beta1 (situ).
        da += 0.5 * (max(1.0, spec.alpha) + 1.0 / spec.beta1) * dg * dg
        reach = np.abs(g) + dg
        scale = np.square(reach) if FUNCTIONS[spec.kind].is_squared else reach
        return a, da + self.activation_ulps * EPS * np.maximum(scale, np.abs(a))

    def up_factor(self, spec: ActivationSpec, u: Array, du: Array) -> tuple[Array, Array]:
        """Center and radius of the factor of the activation that depends on up; it is monotone."""
        b = up_factor(spec, u)
        db = np.maximum(np.abs(up_factor(spec, u + du) - b), np.abs(up_factor(spec, u - du) - b))
        db = np.where(np.isfinite(du), db, np.inf)  # u may be NaN, which passes through every clamp
        return b, db + self.activation_ulps * EPS * (np.abs(b) + FUNCTIONS[spec.kind].is_shifted)


def _code_intervals(x: Array, dx: Array | None) -> tuple[Array, Array, Array, Array]:
    """Codes [M, K] and scale [M, 1] of rows x +- dx, each as center and radius.

    A code rint(x / scale) is monotone in x, and in the scale, so its extremes are at the ends of both.
    """
    codes, scale = (values.astype(np.float64) for values in quantize_activations(x))
    scale = scale[:, None]
    if dx is None:
        return codes, np.zeros_like(codes), scale, np.zeros_like(scale)
    smallest, largest = (
        (np.maximum(ends, 0.0).max(axis=1, keepdims=True, initial=0.0) / 127.0).astype(np.float32)
        for ends in (np.abs(x) - dx, np.abs(x) + dx)
    )
    d_codes = np.zeros_like(codes)
    for end in (x - dx, x + dx):
        for divisor in (smallest, largest):
            at_end = np.clip(np.rint((end / divisor).astype(np.float32)), -127, 127)
            d_codes = np.maximum(d_codes, np.abs(at_end - codes))
    # A row that may be zero may have any codes.
    d_codes = np.where(smallest > 0, d_codes, 127.0 + np.abs(codes))
    d_scale = np.maximum(largest - scale, scale - smallest)
    return codes, d_codes, scale, d_scale
