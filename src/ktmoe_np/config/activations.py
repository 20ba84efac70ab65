"""The activation functions of experts: their names, their parameters, and how users write them.

The extension lists them (``kt_kernel_ext.activations``); `ktmoe_np.reference` states the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .. import kt_kernel_ext as ext

__all__ = [
    "ActivationSpec",
    "activation_kinds",
    "activation_names",
    "default_activation",
    "kind_of_config_key",
    "parse_activation",
    "shown_integer",
]

#: Value of a parameter that an activation does not use.
_NEUTRAL = {"limit": math.inf, "alpha": 1.0, "beta1": 1.0, "beta2": 1.0}

#: Other spellings of the parameters that `parse_activation` accepts.
_OPTION_ALIASES = {"swiglu_limit": "limit", "swiglu_alpha": "alpha"}


@dataclass(frozen=True)
class ActivationSpec:
    """The function between an expert's first projections and its down projection.

    Usually made by `parse_activation`, which fills in the defaults.

    Parameters
    ----------
    kind : str
        One of `activation_kinds`.
    gated : bool
        True when an expert has a gate and an up projection, False when it has one projection. Most kinds
        have one of the two forms only.
    limit : float
        Clamp of the kinds that have one; ``inf`` is no clamp.
    alpha : float
        Slope inside the sigmoid, of ``swigluoai``.
    beta1, beta2 : float
        Saturation of gate and up, of ``situ``.

    Raises
    ------
    ValueError
        Unknown kind, a form that does not exist, or a parameter that the kind does not use or that
        is out of range.

    Examples
    --------
    >>> spec = ActivationSpec("swigluoai", gated=True, limit=7.0, alpha=1.702, beta1=1.0, beta2=1.0)
    >>> spec.kind_id, spec == parse_activation("swigluoai")
    (1, True)
    """

    kind: str
    gated: bool
    limit: float
    alpha: float
    beta1: float
    beta2: float

    def __post_init__(self) -> None:
        known = _registry()
        if self.kind not in known:
            raise ValueError(f"activation: got {self.kind!r}, expected one of {', '.join(known)}")
        if not isinstance(self.gated, bool):
            raise TypeError(f"activation: got {self.kind} with gated={self.gated!r}, expected a bool")
        info = known[self.kind]
        if self.gated and not info.gated:
            raise ValueError(f"activation: got {self.kind} with a gate, expected gated=False")
        if not self.gated and not info.ungated:
            ungated = ", ".join(other.name for other in known.values() if other.ungated)
            raise ValueError(f"activation: got {self.kind} without a gate, expected one of {ungated}")
        used = info.parameters if self.gated else {}
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"activation: got {self.kind} with {name}={value!r}, expected a number")
            try:
                object.__setattr__(self, name, float(value))
            except OverflowError:
                got = f"{self.name} with {name}={shown_integer(int(value))}"
                raise ValueError(f"activation: got {got}, expected one that fits a float") from None
            if name not in used:
                if value != neutral:
                    raise ValueError(f"activation: got {self.name} with {name}={value!r}, expected no {name}")
            elif not value > 0 or (math.isinf(value) and name != "limit"):
                got = f"{self.name} with {name}={value!r}"
                raise ValueError(f"activation: got {got}, expected positive and finite")

    @property
    def kind_id(self) -> int:
        """Id of the kind in the C++ enumeration."""
        return activation_kinds().index(self.kind)

    @property
    def name(self) -> str:
        """The name that `parse_activation` reads, without parameters."""
        return self.kind if self.gated or not _registry()[self.kind].gated else f"{self.kind}_ungated"


def activation_kinds() -> tuple[str, ...]:
    """The kinds of activations, in the order of the C++ enumeration: a kind's id is its position here."""
    return tuple(_registry())


def activation_names() -> tuple[str, ...]:
    """Every name that `parse_activation` reads; the first is the default."""
    return tuple(_named())


def default_activation() -> ActivationSpec:
    """The activation of a layer whose config names none."""
    return next(iter(_named().values()))


def kind_of_config_key(key: str) -> str:
    """The kind that "silu" stands for where a Hugging Face config.json has this key."""
    return next(info.name for info in _registry().values() if info.config_key == key)


def parse_activation(activation: str | ActivationSpec | Mapping[str, Any]) -> ActivationSpec:
    """Read an activation as users write it.

    Parameters
    ----------
    activation : str, ActivationSpec or mapping
        A name (see `activation_names`); a ready `ActivationSpec`, returned as it is; or a mapping with
        the name under ``"kind"`` and any of ``limit`` (also ``swiglu_limit``), ``alpha`` (also
        ``swiglu_alpha``), ``beta1``, ``beta2``, ``gated``.

    Returns
    -------
    ActivationSpec

    Raises
    ------
    ValueError
        Unknown name or option, or a value out of range.
    TypeError
        Something else than the three forms, or a parameter that is not a number.

    Examples
    --------
    >>> parse_activation("silu_ungated").gated
    False
    >>> parse_activation({"kind": "silu", "swiglu_limit": 10.0}).limit
    10.0
    """
    if isinstance(activation, ActivationSpec):
        return activation
    options: dict[str, Any] = {}
    if isinstance(activation, Mapping):
        options = {_OPTION_ALIASES.get(key, key): value for key, value in activation.items()}
        activation = options.pop("kind", None)
        unknown = sorted(str(key) for key in options if key not in {*_NEUTRAL, "gated"})
        if unknown:
            known = ", ".join([*_NEUTRAL, *_OPTION_ALIASES, "gated"])
            raise ValueError(f"activation: got option {unknown[0]!r}, expected one of {known}")
    if not isinstance(activation, str):
        expected = "a name, an ActivationSpec or a mapping with the name under 'kind'"
        raise TypeError(f"activation: got {activation!r}, expected {expected}")
    named = _named()
    if activation not in named:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(named)}")
    spec = named[activation]
    if "gated" in options and options["gated"] != spec.gated:
        spec = _defaults(spec.kind, options["gated"])
    return replace(spec, **options)


@cache
def _registry() -> Mapping[str, ext.ActivationInfo]:
    """The activations of the extension, by name.

    It is imported at first use: the reference can be imported without it.
    """
    from .. import kt_kernel_ext

    return {info.name: info for info in kt_kernel_ext.activations()}


@cache
def _named() -> Mapping[str, ActivationSpec]:
    """Every activation with its defaults: the kinds, then what has a form without a gate beside its own."""
    gated = [_defaults(info.name, True) for info in _registry().values() if info.gated]
    ungated = [_defaults(info.name, False) for info in _registry().values() if info.ungated]
    return {spec.name: spec for spec in (*gated, *ungated)}


def _defaults(kind: str, gated: bool) -> ActivationSpec:
    used = _registry()[kind].parameters if gated else {}
    # The extension has float32 numbers; the shortest decimals that mean them are what users write.
    given = {name: float(str(np.float32(value))) for name, value in used.items()}
    return ActivationSpec(kind, gated, **{**_NEUTRAL, **given})


def shown_integer(number: int) -> str:
    """`number` for a message: of a very long one, which Python may refuse to print, how long it is.

    Examples
    --------
    >>> shown_integer(-2**64), shown_integer(10**5000)
    ('-18446744073709551616', 'an integer of 16610 bits')
    """
    return str(number) if number.bit_length() < 256 else f"an integer of {number.bit_length()} bits"
