"""The functions inside an expert, and the rounding after them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..config import ActivationSpec, parse_activation

__all__ = ["activate", "check_operands", "erfc", "gate_factor", "round_bf16", "sigmoid", "up_factor"]

#: An array in the precision of the computation: float32, or float64 for the high-precision truth.
Array = NDArray[np.floating[Any]]

erfc = np.frompyfunc(math.erfc, 1, 1)


def round_bf16(x: Array) -> NDArray[np.float32]:
    """bf(x): round to bfloat16, to nearest with ties to even.

    Parameters
    ----------
    x : ndarray of float32 or float64, any shape
        float64 is rounded to float32 first, as every bfloat16 result of the engine comes from float32.

    Returns
    -------
    ndarray of float32, the shape of `x`
        Values that bfloat16 represents. NaN stays NaN; too large a value becomes infinite.

    Examples
    --------
    >>> import numpy as np
    >>> round_bf16(np.float32([1.00390625, 1.01171875, 3.4e38]))    # two ties, then past the largest value
    array([1.      , 1.015625,      inf], dtype=float32)
    """
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def activate(
    activation: str | ActivationSpec | Mapping[str, Any], gate: Array, up: Array | None = None
) -> NDArray[np.floating[Any]]:
    """Compute act(g, u) elementwise.

    With L the limit::

        silu          min(g, L) * sig(min(g, L)) * clip(u, -L, L)
        swigluoai     min(g, L) * sig(alpha * min(g, L)) * (clip(u, -L, L) + 1)
        swiglustep    min(g * sig(g), L) * clip(u, -L, L)
        gelu          g * (1 + erf(g / sqrt(2))) / 2 * u
        gelu_tanh     g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g**3))) / 2 * u
        situ          b1 * tanh(g / b1) * sig(g) * b2 * tanh(u / b2)
        relu2         max(g, 0)**2                        (one projection)
        silu_ungated, gelu_tanh_ungated                   (the same without u)

    Parameters
    ----------
    activation : str, ActivationSpec or mapping
        See `ktmoe_np.config.parse_activation`.
    gate : ndarray of float32 or float64, any shape
        g; of an activation that is not gated, the one projection.
    up : ndarray of the same dtype and shape, or None
        u; None exactly when the activation is not gated.

    Returns
    -------
    ndarray of the dtype and shape of `gate`
        NaN in g or u gives NaN, through every clamp. Nothing warns.

    Raises
    ------
    ValueError
        Unknown activation; `up` missing or superfluous; shapes that differ.
    TypeError
        `gate` or `up` neither float32 nor float64, or of two dtypes.

    Examples
    --------
    >>> import numpy as np
    >>> activate("relu2", np.float32([-2, 3]))
    array([0., 9.], dtype=float32)
    >>> activate({"kind": "silu", "swiglu_limit": 1.0}, np.float64([0, 50]), np.float64([5, -5])).round(4)
    array([ 0.    , -0.7311])
    """
    spec, gate, up = check_operands(activation, gate, up)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        factor = gate_factor(spec, gate)
        return factor if up is None else factor * up_factor(spec, up)


def check_operands(
    activation: str | ActivationSpec | Mapping[str, Any], gate: Array, up: Array | None
) -> tuple[ActivationSpec, Array, Array | None]:
    """Check the arguments of `activate`; see there for what is raised."""
    spec = parse_activation(activation)
    gate = np.asarray(gate)
    if gate.dtype not in (np.float32, np.float64):
        raise TypeError(f"gate must be float32 or float64, got {gate.dtype}")
    if spec.gated != (up is not None):
        raise ValueError(
            f"activation {spec.name} {'needs' if spec.gated else 'has no'} up, got up={up!r:.40}"
        )
    if up is not None:
        up = np.asarray(up)
        if up.dtype != gate.dtype:
            raise TypeError(f"up must be {gate.dtype} like gate, got {up.dtype}")
        if up.shape != gate.shape:
            raise ValueError(f"up must have the shape {gate.shape} of gate, got {up.shape}")
    return spec, gate, up


def gate_factor(spec: ActivationSpec, g: Array) -> Array:
    """Compute the factor of `activate` that depends on the gate; all of it when there is no up."""
    limit, alpha, beta = (g.dtype.type(np.float32(value)) for value in (spec.limit, spec.alpha, spec.beta1))
    match spec.kind:
        case "silu" | "swigluoai":
            clamped = np.minimum(g, limit)
            return clamped * sigmoid(alpha * clamped)
        case "swiglustep":
            return np.minimum(g * sigmoid(g), limit)
        case "gelu":
            # 1 + erf(x) as erfc(-x): the sum would cancel for negative g.
            wide = g.astype(np.float64)
            return (0.5 * wide * np.asarray(erfc(-wide / math.sqrt(2.0)), np.float64)).astype(g.dtype)
        case "gelu_tanh":
            # (1 + tanh(z)) / 2 is sig(2 z), which does not cancel for negative g.
            return g * sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (g + 0.044715 * g * g * g))
        case "situ":
            return beta * np.tanh(g / beta) * sigmoid(g)
        case _:  # relu2
            return np.square(np.maximum(g, 0.0))


def up_factor(spec: ActivationSpec, u: Array) -> Array:
    """Compute the factor of `activate` that depends on up."""
    if spec.kind == "situ":
        beta = u.dtype.type(np.float32(spec.beta2))
        return beta * np.tanh(u / beta)
    limit = u.dtype.type(np.float32(spec.limit))
    clipped = np.clip(u, -limit, limit)
    return clipped + u.dtype.type(1.0) if spec.kind == "swigluoai" else clipped


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without an overflow on either side."""
    small = np.exp(-np.abs(x))
    result: Array = np.where(x >= 0, x.dtype.type(1.0), small) / (1 + small)
    return result
