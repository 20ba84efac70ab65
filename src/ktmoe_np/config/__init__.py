"""Frozen descriptions of a mixture-of-experts layer: sizes, activation, and what routing weights scale."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .activation_dtype import ActivationDtype, activation_dtype_name
from .activations import (
    ActivationSpec,
    activation_kinds,
    activation_names,
    default_activation,
    parse_activation,
    shown_integer,
)
from .hf import read_hf_layer

__all__ = [
    "ActivationDtype",
    "ActivationSpec",
    "MoEConfig",
    "activation_dtype_name",
    "activation_kinds",
    "activation_names",
    "parse_activation",
    "shown_integer",
]

#: The sizes of a layer, as `MoEConfig` names them.
_SIZES = ("num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")

#: Those that the shapes of weights follow from.
_SHAPES = ("num_experts", "hidden_size", "moe_intermediate_size")

#: The largest size of a layer: the product of two fits 64 bits.
_MAX_SIZE = 2**31 - 1


def _positive(name: str, value: object) -> int:
    """`value` as an int of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name}: got {shown_integer(number)}, expected at least 1")
    return _bounded(name, number)


def _bounded(name: str, number: int) -> int:
    """`number`, unless it is above any size there is."""
    if number > _MAX_SIZE:
        raise ValueError(f"{name}: got {shown_integer(number)}, expected at most {_MAX_SIZE}")
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
    sources : mapping of str to str, optional
        Size -> where it was read, ``{"moe_intermediate_size": "intermediate_size"}``, for messages.

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
    activation: ActivationSpec = field(default_factory=default_activation)
    layer_idx: int = 0
    scale_inputs: bool = False
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in _SIZES:
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        if not isinstance(self.activation, ActivationSpec):
            raise TypeError(
                f"activation: got {self.activation!r}, expected an ActivationSpec; see parse_activation"
            )
        if not isinstance(self.scale_inputs, bool):
            raise TypeError(f"scale_inputs: got {self.scale_inputs!r}, expected a bool")
        if isinstance(self.layer_idx, bool) or not hasattr(self.layer_idx, "__index__"):
            raise TypeError(f"layer_idx: got {self.layer_idx!r}, expected an integer")
        object.__setattr__(self, "layer_idx", _bounded("layer_idx", operator.index(self.layer_idx)))
        if self.layer_idx < 0:
            raise ValueError(f"layer_idx: got {shown_integer(self.layer_idx)}, expected at least 0")

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
        read = read_hf_layer(config, layer_idx)
        layer = cls(
            **read.sizes,
            activation=parse_activation(read.activation),
            layer_idx=layer_idx,
            scale_inputs=read.scale_inputs,
            sources=read.sources,
        )
        layer.check_model()
        return layer

    def with_sources_of(self, read: MoEConfig) -> MoEConfig:
        """The same layer, with what `read` says of where its sizes are from, as far as they are the same."""
        same = [size for size in _SIZES if getattr(self, size) == getattr(read, size)]
        return replace(self, sources={size: read.sources[size] for size in same if size in read.sources})

    def origin(self) -> str:
        """What a message says of the sizes behind the shape that it expected; empty where nobody knows.

        Examples
        --------
        >>> MoEConfig(8, 2, 64, 32, sources={"moe_intermediate_size": "intermediate_size"}).origin()
        ', by intermediate_size 32 of the configuration'
        """
        sizes = [f"{name} {getattr(self, size)}" for size, name in self.sources.items() if size in _SHAPES]
        return f", by {', '.join(sizes)} of the configuration" if sizes else ""

    def check_model(self) -> None:
        """Raise ValueError for what cannot be a layer of a whole model, whose router picks different experts.

        A layer that is made by itself may have P above E: its caller may send a token to an expert twice.
        """
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: got {self.num_experts_per_tok}, "
                f"expected at most num_experts, {self.num_experts}"
            )
