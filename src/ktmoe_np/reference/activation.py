"""The functions inside an expert with their derivatives, and the rounding after them.

`FUNCTIONS` has an entry for each activation: a further one is its functions and its entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..config import ActivationSpec, parse_activation

__all__ = [
    "FUNCTIONS",
    "Functions",
    "activate",
    "activate_gradients",
    "erfc",
    "gate_factor",
    "gate_slope",
    "round_bf16",
    "up_factor",
    "up_slope",
]

#: An array in the precision of the computation: float32, or float64 for the exact result to compare with.
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
        relu          max(g, 0) * u
        relu2         max(g, 0)**2                        (one projection)
        silu_ungated, gelu_tanh_ungated, relu_ungated     (the same without u)

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
    spec, gate, up = _check_operands(activation, gate, up)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        factor = gate_factor(spec, gate)
        return factor if up is None else factor * up_factor(spec, up)


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
        relu              A' = 1 where g > 0, 0 elsewhere
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
    spec, gate, up = _check_operands(activation, gate, up)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        slope = gate_slope(spec, gate)
        if up is None:
            return slope, None
        return slope * up_factor(spec, up), gate_factor(spec, gate) * up_slope(spec, up)


def _check_operands(
    activation: str | ActivationSpec | Mapping[str, Any], gate: Array, up: Array | None
) -> tuple[ActivationSpec, Array, Array | None]:
    """Check the arguments of `activate`; see there for what is raised."""
    spec = parse_activation(activation)
    gate = np.asarray(gate)
    if gate.dtype not in (np.float32, np.float64):
        raise TypeError(f"gate: got {gate.dtype}, expected float32 or float64")
    if spec.gated != (up is not None):
        expected = "an array" if spec.gated else "None"
        raise ValueError(f"up: got {up!r:.40}, expected {expected} with activation {spec.name}")
    if up is not None:
        up = np.asarray(up)
        if up.dtype != gate.dtype:
            raise TypeError(f"up: got {up.dtype}, expected {gate.dtype} like gate")
        if up.shape != gate.shape:
            raise ValueError(f"up: got shape {up.shape}, expected {gate.shape} like gate")
    return spec, gate, up


def gate_factor(spec: ActivationSpec, g: Array) -> Array:
    """Compute the factor of `activate` that depends on the gate; all of it when there is no up."""
    return FUNCTIONS[spec.kind].gate(spec, g)


def gate_slope(spec: ActivationSpec, g: Array) -> Array:
    """Compute A'(g), the derivative of `gate_factor`."""
    return FUNCTIONS[spec.kind].gate_slope(spec, g)


def up_factor(spec: ActivationSpec, u: Array) -> Array:
    """Compute the factor of `activate` that depends on up."""
    return FUNCTIONS[spec.kind].up(spec, u)


def up_slope(spec: ActivationSpec, u: Array) -> Array:
    """Compute B'(u), the derivative of `up_factor`."""
    return FUNCTIONS[spec.kind].up_slope(spec, u)


# ---- the functions and their derivatives, A and A', B and B' ----


def _parameter(value: float, x: Array) -> Array:
    """A parameter, a float32 number, in the precision of the computation."""
    return np.asarray(np.float32(value), x.dtype)


def _clamped_silu(spec: ActivationSpec, g: Array) -> Array:
    clamped = np.minimum(g, _parameter(spec.limit, g))
    return clamped * _sigmoid(_parameter(spec.alpha, g) * clamped)


def _clamped_silu_slope(spec: ActivationSpec, g: Array) -> Array:
    slope = _silu_slope(_parameter(spec.alpha, g) * g)
    return np.where(g > _parameter(spec.limit, g), g.dtype.type(0), slope)


def _silu_clamped(spec: ActivationSpec, g: Array) -> Array:
    return np.minimum(g * _sigmoid(g), _parameter(spec.limit, g))


def _silu_clamped_slope(spec: ActivationSpec, g: Array) -> Array:
    return np.where(g * _sigmoid(g) > _parameter(spec.limit, g), g.dtype.type(0), _silu_slope(g))


def _gelu(spec: ActivationSpec, g: Array) -> Array:
    # 1 + erf(x) as erfc(-x): the sum would cancel for negative g.
    wide = g.astype(np.float64)
    return (0.5 * wide * np.asarray(erfc(-wide / math.sqrt(2.0)), np.float64)).astype(g.dtype)


def _gelu_slope(spec: ActivationSpec, g: Array) -> Array:
    # exp(-x**2 / 2) is 0 in float64 from 39 on, and the bound keeps infinity times 0 away.
    wide = np.clip(g.astype(np.float64), -40.0, 40.0)
    below = 0.5 * np.asarray(erfc(-wide / math.sqrt(2.0)), np.float64)
    density = np.exp(-0.5 * wide * wide) / math.sqrt(2.0 * math.pi)
    return (below + wide * density).astype(g.dtype)


def _gelu_tanh(spec: ActivationSpec, g: Array) -> Array:
    # (1 + tanh(z)) / 2 is sig(2 z), which does not cancel for negative g.
    return g * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (g + 0.044715 * g * g * g))


def _gelu_tanh_slope(spec: ActivationSpec, g: Array) -> Array:
    # Beyond 30 the exponential in the sigmoid is 0 in float64, and g**3 may overflow.
    x = np.clip(g, -30.0, 30.0)
    scale = 2.0 * math.sqrt(2.0 / math.pi)
    z, z_slope = scale * (x + 0.044715 * x * x * x), scale * (1.0 + 3.0 * 0.044715 * x * x)
    return _sigmoid(z) * (1.0 + x * z_slope * _sigmoid(-z))


def _situ(spec: ActivationSpec, g: Array) -> Array:
    beta = _parameter(spec.beta1, g)
    return beta * np.tanh(g / beta) * _sigmoid(g)


def _situ_slope(spec: ActivationSpec, g: Array) -> Array:
    beta = _parameter(spec.beta1, g)
    falling = beta * np.tanh(g / beta) * _sigmoid(-g)
    return _sigmoid(g) * (_sech_squared(g / beta) + falling)


def _relu(spec: ActivationSpec, g: Array) -> Array:
    return np.maximum(g, g.dtype.type(0))


def _relu_slope(spec: ActivationSpec, g: Array) -> Array:
    return np.where(np.isnan(g), g, (g > 0).astype(g.dtype))


def _relu2(spec: ActivationSpec, g: Array) -> Array:
    return np.square(np.maximum(g, 0.0))


def _relu2_slope(spec: ActivationSpec, g: Array) -> Array:
    return 2.0 * np.maximum(g, 0.0)


def _clipped(spec: ActivationSpec, u: Array) -> Array:
    limit = _parameter(spec.limit, u)
    return np.clip(u, -limit, limit)


def _clipped_slope(spec: ActivationSpec, u: Array) -> Array:
    inside = np.where(np.isnan(u), u, u.dtype.type(1))
    return np.where(np.abs(u) > _parameter(spec.limit, u), u.dtype.type(0), inside)


def _clipped_and_one(spec: ActivationSpec, u: Array) -> Array:
    return _clipped(spec, u) + u.dtype.type(1.0)


def _saturated(spec: ActivationSpec, u: Array) -> Array:
    beta = _parameter(spec.beta2, u)
    return beta * np.tanh(u / beta)


def _saturated_slope(spec: ActivationSpec, u: Array) -> Array:
    return _sech_squared(u / _parameter(spec.beta2, u))


class Functions(NamedTuple):
    """The factors of an activation and their derivatives; up is not used without a gate."""

    gate: Callable[[ActivationSpec, Array], Array]
    gate_slope: Callable[[ActivationSpec, Array], Array]
    up: Callable[[ActivationSpec, Array], Array] = _clipped
    up_slope: Callable[[ActivationSpec, Array], Array] = _clipped_slope
    is_squared: bool = False  #: whether the gate's factor grows with the square of the gate
    is_shifted: bool = False  #: whether a number of about 1 is added to up


#: The functions of each activation.
FUNCTIONS: Mapping[str, Functions] = {
    "silu": Functions(_clamped_silu, _clamped_silu_slope),
    "swigluoai": Functions(_clamped_silu, _clamped_silu_slope, _clipped_and_one, is_shifted=True),
    "swiglustep": Functions(_silu_clamped, _silu_clamped_slope),
    "gelu": Functions(_gelu, _gelu_slope),
    "gelu_tanh": Functions(_gelu_tanh, _gelu_tanh_slope),
    "situ": Functions(_situ, _situ_slope, _saturated, _saturated_slope),
    "relu2": Functions(_relu2, _relu2_slope, is_squared=True),
    "relu": Functions(_relu, _relu_slope),
}


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without an overflow on either side."""
    small = np.exp(-np.abs(x))
    result: Array = np.where(x >= 0, x.dtype.type(1.0), small) / (1 + small)
    return result


def _silu_slope(x: Array) -> Array:
    """d/dx of x * sig(x); beyond 800 the exponential in the sigmoid is 0 in float64."""
    x = np.clip(x, -800.0, 800.0)
    result: Array = _sigmoid(x) * (1.0 + x * _sigmoid(-x))
    return result


def _sech_squared(x: Array) -> Array:
    """1 / cosh(x)**2, without the cancellation of 1 - tanh(x)**2."""
    result: Array = 4.0 * _sigmoid(2.0 * x) * _sigmoid(-2.0 * x)
    return result
