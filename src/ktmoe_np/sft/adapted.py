"""The interface of a layer with adapters for code that reads and writes adapters."""

from __future__ import annotations

import os
from typing import Protocol

from ..arrays.checks import Array
from ..arrays.types import ArrayLike
from ..config import MoEConfig
from .options import SFTOptions

__all__ = ["AdaptedLayer"]


class AdaptedLayer(Protocol):
    """A layer whose adapters can be read and replaced; `BaseSFTMoEWrapper` is one."""

    config: MoEConfig
    options: SFTOptions
    weight_path: str | os.PathLike[str] | None

    @property
    def layer_idx(self) -> int:
        """The layer's number in the model."""

    @property
    def lora_weights(self) -> dict[str, Array]:
        """The adapters, by name."""

    def update_lora_weights(
        self,
        gate_lora_a: ArrayLike | None = None,
        gate_lora_b: ArrayLike | None = None,
        up_lora_a: ArrayLike | None = None,
        up_lora_b: ArrayLike | None = None,
        down_lora_a: ArrayLike | None = None,
        down_lora_b: ArrayLike | None = None,
    ) -> None:
        """Replace some adapters by arrays."""
