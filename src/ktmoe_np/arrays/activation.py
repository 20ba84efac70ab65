"""The formulas of `ktmoe_np.reference.activate`, on float32 arrays of any library."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import ActivationSpec
from .library import ArrayLibrary

__all__ = ["activate"]


def activate(library: ArrayLibrary, spec: ActivationSpec, gate: Any, up: Any) -> Any:
    """act(g, u) elementwise; `up` is None exactly when the activation is not gated."""
    factor = _gate_factor(library, spec, gate)
    return factor if up is None else factor * _up_factor(library, spec, up)


def _gate_factor(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    xp = library.xp
    match spec.kind:
        case "silu" | "swigluoai":
            clamped = xp.clip(g, None, spec.limit)
            return clamped * _sigmoid(library, spec.alpha * clamped)
        case "swiglustep":
            return xp.clip(g * _sigmoid(library, g), None, spec.limit)
        case "gelu":
            return 0.5 * g * library.erfc(g * -(0.5**0.5))
        case "gelu_tanh":
            return g * _sigmoid(library, 2.0 * (2.0 / np.pi) ** 0.5 * (g + 0.044715 * g * g * g))
        case "situ":
            return spec.beta1 * xp.tanh(g / spec.beta1) * _sigmoid(library, g)
        case _:  # relu2
            return xp.square(xp.clip(g, 0.0, None))


def _up_factor(library: ArrayLibrary, spec: ActivationSpec, u: Any) -> Any:
    xp = library.xp
    if spec.kind == "situ":
        return spec.beta2 * xp.tanh(u / spec.beta2)
    clipped = xp.clip(u, -spec.limit, spec.limit)
    return clipped + 1.0 if spec.kind == "swigluoai" else clipped


def _sigmoid(library: ArrayLibrary, x: Any) -> Any:
    """1 / (1 + exp(-x)) without an overflow on either side."""
    small = library.xp.exp(-library.xp.abs(x))
    return library.filled(small, x >= 0.0, 1.0) / (1.0 + small)
