"""The experts of a decoder, from its checkpoint or from a file of their own."""

from __future__ import annotations

from typing import Any

from ..arrays.types import PathLike
from ..experts import KTMoEWrapper, Overrides
from ..inference.base import BaseMoEWrapper
from ..sft.base import BaseSFTMoEWrapper
from .config import DecoderConfig

__all__ = ["load_experts"]


def load_experts(
    path: PathLike, config: DecoderConfig, layer_idx: int, method: str | None, mode: str, overrides: Overrides
) -> BaseMoEWrapper | BaseSFTMoEWrapper:
    """Load the experts of a layer. An option of the other mode is an error that names it.

    Raises
    ------
    ValueError
        Experts of another model: other sizes than those of the decoder.
    """
    options: dict[str, Any] = {"mode": mode, **overrides}
    experts: BaseMoEWrapper | BaseSFTMoEWrapper
    experts = KTMoEWrapper.from_pretrained(path, layer_idx, method, **options)
    for name in ("hidden_size", "num_experts", "num_experts_per_tok"):
        got, expected = getattr(experts.config, name), getattr(config, name)
        if got != expected:
            raise ValueError(f"{path}: {name} of layer {layer_idx}: got {got}, expected {expected}")
    return experts
