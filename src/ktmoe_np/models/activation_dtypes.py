"""What the experts of a decoder take activations in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..config import ActivationDtype
from ..formats.activation_blocks import default_in_models
from ..formats.methods import find_method
from ..layers.gguf import GgufWeights
from ..sft.base import BaseSFTMoEWrapper
from .ranks import Experts, own_layer

__all__ = ["SequenceDtypes"]

_Name: TypeAlias = Literal["bfloat16", "int8"]


@dataclass(frozen=True)
class SequenceDtypes:
    """What the experts of a layer take the activations of a sequence in: ``bfloat16`` or ``int8``."""

    prefill: _Name  #: with the first tokens, those that come with an empty cache
    steps: _Name  #: with all later ones

    @classmethod
    def of(
        cls,
        parallel: Experts,
        activation_dtype: ActivationDtype | None,
        prefill_activation_dtype: ActivationDtype | None,
    ) -> SequenceDtypes:
        """Complete and check the dtypes that were asked for.

        Raises
        ------
        TypeError, ValueError
            No dtype of activations, or one that the products of the experts cannot have.
        """
        experts = own_layer(parallel)
        steps = experts._dtype_of_call(activation_dtype)
        if steps is None:
            formats = experts.formats if isinstance(experts, GgufWeights) else {}
            mode = "sft" if isinstance(experts, BaseSFTMoEWrapper) else "inference"
            steps = default_in_models(find_method(experts.method, mode), formats)
        try:
            prefill = experts._dtype_of_call(prefill_activation_dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prefill_{error}") from None
        found = cls(_name(prefill or steps), _name(steps))
        if experts is not parallel and found.prefill != found.steps:
            raise ValueError(
                f"prefill_activation_dtype: got {found.prefill!r}, expected {found.steps!r} as in later "
                "steps: calls of ranks are of different sequences"
            )
        return found


def _name(name: str) -> _Name:
    """A name, for the type checker."""
    return "int8" if name == "int8" else "bfloat16"
