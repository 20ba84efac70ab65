"""The formulas of `ktmoe_np.reference.activate`, on float32 arrays of any library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..config import ActivationSpec
from .library import ArrayLibrary

__all__ = ["FORMULAS", "activate"]

Factor = Callable[[ArrayLibrary, ActivationSpec, Any], Any]


def activate(library: ArrayLibrary, spec: ActivationSpec, gate: Any, up: Any) -> Any:
    """act(g, u) elementwise; `up` is None exactly when the activation is not gated."""
    gate_factor, up_factor = FORMULAS[spec.kind]
    factor = gate_factor(library, spec, gate)
    return factor if up is None else factor * up_factor(library, spec, up)


def _sigmoid(library: ArrayLibrary, x: Any) -> Any:
    """1 / (1 + exp(-x)) without an overflow on either side."""
    small = library.xp.exp(-library.xp.abs(x))
    return library.filled(small, x >= 0.0, 1.0) / (1.0 + small)


def _clamped_silu(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    clamped = library.xp.clip(g, None, spec.limit)
    return clamped * _sigmoid(library, spec.alpha * clamped)


def _silu_clamped(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    return library.xp.clip(g * _sigmoid(library, g), None, spec.limit)


def _gelu(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    return 0.5 * g * library.erfc(g * -(0.5**0.5))


def _gelu_tanh(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    return g * _sigmoid(library, 2.0 * (2.0 / np.pi) ** 0.5 * (g + 0.044715 * g * g * g))


def _situ(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    return spec.beta1 * library.xp.tanh(g / spec.beta1) * _sigmoid(library, g)


def _relu(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    return library.xp.clip(g, 0.0, None)


def _relu2(library: ArrayLibrary, spec: ActivationSpec, g: Any) -> Any:
    return library.xp.square(library.xp.clip(g, 0.0, None))


def _clipped(library: ArrayLibrary, spec: ActivationSpec, u: Any) -> Any:
    return library.xp.clip(u, -spec.limit, spec.limit)


def _clipped_and_one(library: ArrayLibrary, spec: ActivationSpec, u: Any) -> Any:
    return _clipped(library, spec, u) + 1.0


def _saturated(library: ArrayLibrary, spec: ActivationSpec, u: Any) -> Any:
    return spec.beta2 * library.xp.tanh(u / spec.beta2)


#: The factors of each activation that depend on the gate and on up.
FORMULAS: Mapping[str, tuple[Factor, Factor]] = {
    "silu": (_clamped_silu, _clipped),
    "swigluoai": (_clamped_silu, _clipped_and_one),
    "swiglustep": (_silu_clamped, _clipped),
    "gelu": (_gelu, _clipped),
    "gelu_tanh": (_gelu_tanh, _clipped),
    "situ": (_situ, _saturated),
    "relu2": (_relu2, _clipped),
    "relu": (_relu, _clipped),
}
