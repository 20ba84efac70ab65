"""The derivatives of the functions inside an expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import ActivationSpec
from .activation import Array, check_operands, erfc, gate_factor, sigmoid, up_factor

__all__ = ["activate_gradients", "gate_slope", "up_slope"]


def activate_gradients(
    activation: str | ActivationSpec | Mapping[str, Any], gate: Array, up: Array | None = None
) -> tuple[Array, Array | None]:
    """Compute the partial derivatives of act(g, u) elementwise.

    Every activation is a product A(g) * B(u) (see `activate`), so they are A'(g) * B(u) and A(g) * B'(u).
    With L the limit, sig the logistic function and v = min(g, L)::

        silu, swigluoai   A' = sig(alpha v) * (1 + alpha v * sig(-alpha v)), 0 where g > L
        swiglustep        A' = sig(g) * (1 + g * sig(-g)), 0 where g * sig(g) > L
        gelu              A' = (1 + erf(g / sqrt(2))) / 2 + g * exp(-g**2 / 2) / sqrt(2 pi)
        gelu_tanh         A' = sig(z) * (1 + g * z' * sig(-z)), z = sqrt(8 / pi) * (g + 0.044715 * g**3)
        situ              A' = sech(g / b1)**2 * sig(g) + b1 * tanh(g / b1) * sig(g) * sig(-g)
        relu2             A' = 2 * max(g, 0)
        situ              B' = sech(u / b2)**2
        the others        B' = 1, 0 where abs(u) > L

    At the boundary of a clamp the derivative is the one of the inside.

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
    d_gate : ndarray of the dtype and shape of `gate`
    d_up : ndarray of the dtype and shape of `gate`, or None when the activation is not gated
        NaN in g or u gives NaN in both. Nothing finite, however large, makes A' or B' NaN. Nothing warns.

    Raises
    ------
    ValueError
        Unknown activation; `up` missing or superfluous; shapes that differ.
    TypeError
        `gate` or `up` neither float32 nor float64, or of two dtypes.

    Examples
    --------
    >>> import numpy as np
    >>> activate_gradients("relu2", np.float32([-2, 3]))
    (array([0., 6.], dtype=float32), None)
    >>> limited = {"kind": "silu", "limit": 1.0}
    >>> activate_gradients(limited, np.float64([0, 2]), np.float64([1, 5]))    # the second is clamped twice
    (array([0.5, 0. ]), array([0., 0.]))
    """
    spec, gate, up = check_operands(activation, gate, up)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        slope = gate_slope(spec, gate)
        if up is None:
            return slope, None
        return slope * up_factor(spec, up), gate_factor(spec, gate) * up_slope(spec, up)


def gate_slope(spec: ActivationSpec, g: Array) -> Array:
    """Compute A'(g), the derivative of `gate_factor`."""
    limit, alpha, beta = (g.dtype.type(np.float32(value)) for value in (spec.limit, spec.alpha, spec.beta1))
    match spec.kind:
        case "silu" | "swigluoai":
            return np.where(g > limit, g.dtype.type(0), _silu_slope(alpha * g))
        case "swiglustep":
            return np.where(g * sigmoid(g) > limit, g.dtype.type(0), _silu_slope(g))
        case "gelu":
            # exp(-x**2 / 2) is 0 in float64 from 39 on, and the bound keeps infinity times 0 away.
            wide = np.clip(g.astype(np.float64), -40.0, 40.0)
            below = 0.5 * np.asarray(erfc(-wide / math.sqrt(2.0)), np.float64)
            density = np.exp(-0.5 * wide * wide) / math.sqrt(2.0 * math.pi)
            return (below + wide * density).astype(g.dtype)
        case "gelu_tanh":
            # Beyond 30 the exponential in the sigmoid is 0 in float64, and g**3 may overflow.
            x = np.clip(g, -30.0, 30.0)
            scale = 2.0 * math.sqrt(2.0 / math.pi)
            z, z_slope = scale * (x + 0.044715 * x * x * x), scale * (1.0 + 3.0 * 0.044715 * x * x)
            return sigmoid(z) * (1.0 + x * z_slope * sigmoid(-z))
        case "situ":
            falling = beta * np.tanh(g / beta) * sigmoid(-g)
            return sigmoid(g) * (_sech_squared(g / beta) + falling)
        case _:  # relu2
            return 2.0 * np.maximum(g, 0.0)


def up_slope(spec: ActivationSpec, u: Array) -> Array:
    """Compute B'(u), the derivative of `up_factor`."""
    if spec.kind == "situ":
        return _sech_squared(u / u.dtype.type(np.float32(spec.beta2)))
    zero, one = u.dtype.type(0), u.dtype.type(1)
    inside = np.where(np.isnan(u), u, one)
    return np.where(np.abs(u) > u.dtype.type(np.float32(spec.limit)), zero, inside)


def _silu_slope(x: Array) -> Array:
    """d/dx of x * sig(x); beyond 800 the exponential in the sigmoid is 0 in float64."""
    x = np.clip(x, -800.0, 800.0)
    result: Array = sigmoid(x) * (1.0 + x * sigmoid(-x))
    return result


def _sech_squared(x: Array) -> Array:
    """1 / cosh(x)**2, without the cancellation of 1 - tanh(x)**2."""
    result: Array = 4.0 * sigmoid(2.0 * x) * sigmoid(-2.0 * x)
    return result
