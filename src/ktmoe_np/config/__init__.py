"""Frozen descriptions of a mixture-of-experts layer: sizes, activation, and what routing weights scale."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .hf import read_hf_layer

__all__ = [
    "ACTIVATION_KINDS",
    "ActivationSpec",
    "MoEConfig",
    "activation_names",
    "parse_activation",
    "shown_integer",
]

#: The activations, in the order of the C++ enumeration: a kind's id is its position here.
ACTIVATION_KINDS = ("silu", "swigluoai", "swiglustep", "gelu", "gelu_tanh", "situ", "relu2")

#: Kinds that exist with one projection only ("up" absent); relu2 exists in that form alone.
_UNGATED_KINDS = ("relu2", "silu", "gelu_tanh")

#: Value of a parameter that an activation does not use.
_NEUTRAL = {"limit": math.inf, "alpha": 1.0, "beta1": 1.0, "beta2": 1.0}

#: Parameters that a gated kind uses, with the values of the models that introduced them.
_PARAMETERS: dict[str, dict[str, float]] = {
    "silu": {"limit": math.inf},
    "swigluoai": {"limit": 7.0, "alpha": 1.702},
    "swiglustep": {"limit": 7.0},
    "situ": {"beta1": 4.0, "beta2": 25.0},
}

#: Other spellings of the parameters that `parse_activation` accepts.
_OPTION_ALIASES = {"swiglu_limit": "limit", "swiglu_alpha": "alpha"}

#: The largest size of a layer: the product of two fits 64 bits.
_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class ActivationSpec:
    """The function between an expert's first projections and its down projection.

    Usually made by `parse_activation`, which fills in the defaults.

    Parameters
    ----------
    kind : str
        One of `ACTIVATION_KINDS`.
    gated : bool
        True when an expert has a gate and an up projection, False when it has one projection.
        ``relu2`` is never gated; ``silu`` and ``gelu_tanh`` come in both forms; the others are gated.
    limit : float
        Clamp of ``silu``, ``swigluoai`` and ``swiglustep``; ``inf`` is no clamp.
    alpha : float
        Slope inside the sigmoid of ``swigluoai``.
    beta1, beta2 : float
        Saturation of gate and up in ``situ``.

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
        if self.kind not in ACTIVATION_KINDS:
            raise ValueError(
                f"activation kind {self.kind!r} is unknown; known: {', '.join(ACTIVATION_KINDS)}"
            )
        if not isinstance(self.gated, bool):
            raise TypeError(f"activation {self.kind}: gated must be a bool, got {self.gated!r}")
        if self.gated and self.kind == "relu2":
            raise ValueError("activation relu2 is not gated: expected gated=False")
        if not self.gated and self.kind not in _UNGATED_KINDS:
            raise ValueError(
                f"activation {self.kind} is always gated; not gated are {', '.join(_UNGATED_KINDS)}"
            )
        used = _PARAMETERS.get(self.kind, {}) if self.gated else {}
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"activation {self.kind}: {name} must be a number, got {value!r}")
            try:
                object.__setattr__(self, name, float(value))
            except OverflowError:
                message = f"activation {self.name}: {name} must fit a float, got {shown_integer(int(value))}"
                raise ValueError(message) from None
            if name not in used:
                if value != neutral:
                    raise ValueError(f"activation {self.name} has no {name}; got {name}={value!r}")
            elif not value > 0 or (math.isinf(value) and name != "limit"):
                raise ValueError(f"activation {self.name}: {name} must be positive and finite, got {value!r}")

    @property
    def kind_id(self) -> int:
        """Id of the kind in the C++ enumeration."""
        return ACTIVATION_KINDS.index(self.kind)

    @property
    def name(self) -> str:
        """The name that `parse_activation` reads, without parameters."""
        return self.kind if self.gated or self.kind == "relu2" else f"{self.kind}_ungated"


def _defaults(kind: str, gated: bool) -> ActivationSpec:
    used = _PARAMETERS.get(kind, {}) if gated else {}
    return ActivationSpec(kind, gated, **{**_NEUTRAL, **used})


_NAMED = {
    spec.name: spec
    for spec in (
        *(_defaults(kind, True) for kind in ACTIVATION_KINDS if kind != "relu2"),
        *(_defaults(kind, False) for kind in _UNGATED_KINDS),
    )
}


def activation_names() -> tuple[str, ...]:
    """Every name that `parse_activation` reads."""
    return tuple(_NAMED)


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
            raise ValueError(f"activation option {unknown[0]!r} is unknown; known: {known}")
    if not isinstance(activation, str):
        expected = "a name, an ActivationSpec or a mapping with the name under 'kind'"
        raise TypeError(f"activation must be {expected}, got {activation!r}")
    if activation not in _NAMED:
        raise ValueError(f"activation {activation!r} is unknown; known: {', '.join(_NAMED)}")
    spec = _NAMED[activation]
    if "gated" in options and options["gated"] != spec.gated:
        spec = _defaults(spec.kind, options["gated"])
    return replace(spec, **options)


def shown_integer(number: int) -> str:
    """`number` for a message: of a very long one, which Python may refuse to print, how long it is.

    Examples
    --------
    >>> shown_integer(-2**64), shown_integer(10**5000)
    ('-18446744073709551616', 'an integer of 16610 bits')
    """
    return str(number) if number.bit_length() < 256 else f"an integer of {number.bit_length()} bits"


def _positive(name: str, value: object) -> int:
    """`value` as an int of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {shown_integer(number)}")
    return _bounded(name, number)


def _bounded(name: str, number: int) -> int:
    """`number`, unless it is above any size there is."""
    if number > _MAX_SIZE:
        raise ValueError(f"{name} must be at most {_MAX_SIZE}, got {shown_integer(number)}")
    return number


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and activation of the experts of one layer, and what the routing weights scale.

    Parameters
    ----------
    num_experts : int
        E, the experts that are routed to (shared experts are the caller's).
    num_experts_per_tok : int
        P, the experts that a token is sent to.
    hidden_size : int
        H, the width of an expert's input and output.
    moe_intermediate_size : int
        I, the width inside an expert.
    activation : ActivationSpec, optional
        Default gated silu.
    layer_idx : int, optional
        The layer's number in the model, from 0.
    scale_inputs : bool, optional
        Routing weights scale what enters the experts, as in Llama-4, and not what leaves them.

    Raises
    ------
    TypeError, ValueError
        A size that is not an integer, not positive or above 2**31 - 1; `scale_inputs` that is not a bool.

    Examples
    --------
    >>> config = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "hidden_act": "silu",
    ...           "moe_intermediate_size": 768, "intermediate_size": 6144}
    >>> layer = MoEConfig.from_hf_config(config, layer_idx=3)
    >>> layer.moe_intermediate_size, layer.activation.kind, layer.layer_idx
    (768, 'silu', 3)
    """

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    activation: ActivationSpec = _NAMED["silu"]
    layer_idx: int = 0
    scale_inputs: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in ("activation", "layer_idx", "scale_inputs"):
                object.__setattr__(self, field.name, _positive(field.name, getattr(self, field.name)))
        if not isinstance(self.activation, ActivationSpec):
            raise TypeError(
                f"activation must be an ActivationSpec, got {self.activation!r}; see parse_activation"
            )
        if not isinstance(self.scale_inputs, bool):
            raise TypeError(f"scale_inputs: got {self.scale_inputs!r}, expected a bool")
        if isinstance(self.layer_idx, bool) or not hasattr(self.layer_idx, "__index__"):
            raise TypeError(f"layer_idx must be an integer, got {self.layer_idx!r}")
        object.__setattr__(self, "layer_idx", _bounded("layer_idx", operator.index(self.layer_idx)))
        if self.layer_idx < 0:
            raise ValueError(f"layer_idx must be at least 0, got {shown_integer(self.layer_idx)}")

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], layer_idx: int) -> MoEConfig:
        """Read the ``config.json`` of a Hugging Face checkpoint.

        Parameters
        ----------
        config : mapping
            The parsed file. The text model's part may be nested (``text_config`` and the like).
        layer_idx : int
            The layer; matters where a model sets a value per layer.

        Returns
        -------
        MoEConfig

        Raises
        ------
        ValueError
            A size that is missing, contradictory, not positive or above 2**31 - 1, more experts of a
            token than there are, or an activation that is not supported.
        TypeError
            A value of the wrong type.
        """
        sizes, activation, scale_inputs = read_hf_layer(config, layer_idx)
        layer = cls(
            **sizes,
            activation=parse_activation(activation),
            layer_idx=layer_idx,
            scale_inputs=scale_inputs,
        )
        layer.check_model()
        return layer

    def check_model(self) -> None:
        """Raise ValueError for what cannot be a layer of a whole model, whose router picks different experts.

        A layer that is made by itself may have P above E: its caller may send a token to an expert twice.
        """
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts, {self.num_experts}, "
                f"got {self.num_experts_per_tok}"
            )
