"""The adapters of a layer on several ranks as those of one layer, for code that reads and writes files."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ..arrays.checks import Array
from ..arrays.types import ArrayLike
from ..config import MoEConfig
from ..sft.options import SFTOptions
from .expert_parallel_sft import ExpertParallelSFT

__all__ = ["WholeAdapters"]


class WholeAdapters:
    """The whole layer, as `ktmoe_np.sft.import_peft` and `export_peft` see it: an `AdaptedLayer`.

    Parameters
    ----------
    parallel : ExpertParallelSFT
    lora_weights : mapping of str to array [E, ...], optional
        The adapters of all experts, as `ExpertParallelSFT.gather_experts` gives them.
    """

    def __init__(self, parallel: ExpertParallelSFT, lora_weights: Mapping[str, Array] | None = None) -> None:
        self._parallel = parallel
        self.lora_weights = dict(lora_weights or {})
        self.config: MoEConfig = parallel.config
        self.options: SFTOptions = parallel.layer.options
        self.weight_path: str | os.PathLike[str] | None = parallel.layer.weight_path

    @property
    def layer_idx(self) -> int:
        """The layer's number in the model."""
        return self.config.layer_idx

    def update_lora_weights(
        self,
        gate_lora_a: ArrayLike | None = None,
        gate_lora_b: ArrayLike | None = None,
        up_lora_a: ArrayLike | None = None,
        up_lora_b: ArrayLike | None = None,
        down_lora_a: ArrayLike | None = None,
        down_lora_b: ArrayLike | None = None,
    ) -> None:
        """Give this rank's experts their part of adapters of all experts. Not collective."""
        given = {
            "gate_lora_a": gate_lora_a,
            "gate_lora_b": gate_lora_b,
            "up_lora_a": up_lora_a,
            "up_lora_b": up_lora_b,
            "down_lora_a": down_lora_a,
            "down_lora_b": down_lora_b,
        }
        own = {
            name: np.asarray(value)[self._parallel.experts]
            for name, value in given.items()
            if value is not None
        }
        self._parallel.update_lora_weights(**own)
