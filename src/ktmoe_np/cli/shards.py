"""Adapters, and what an optimizer keeps of them, of a model whose experts lie on several ranks.

Files have those of all experts; each rank trains its own. In one process both are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..arrays.checks import Array
from ..distributed.adapters import WholeAdapters
from ..distributed.expert_parallel_sft import ExpertParallelSFT
from ..models import MoEDecoder
from ..sft.adapted import AdaptedLayer

__all__ = ["Shards"]

#: Axes of adapters: experts, rows and columns. Nothing else that is kept has as many.
_AXES = 3


class Shards:
    """What of a model's adapters is this rank's.

    Parameters
    ----------
    model : MoEDecoder
        Loaded for training.
    """

    def __init__(self, model: MoEDecoder) -> None:
        self._layers = model.trained_experts()
        self.ranks = model.ranks

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files."""
        return self.ranks is None or self.ranks.is_first

    def whole(self, named: Mapping[str, Array]) -> dict[str, Array]:
        """Those of all experts. Collective."""
        first = self._layers[0]
        if not isinstance(first, ExpertParallelSFT):
            return dict(named)
        adapters = {name: value for name, value in named.items() if value.ndim == _AXES}
        return {**named, **first.gather_experts(adapters)}

    def own(self, named: Mapping[str, Array]) -> dict[str, Array]:
        """Those of this rank's experts, of all."""
        first = self._layers[0]
        if not isinstance(first, ExpertParallelSFT):
            return dict(named)
        return {name: value[first.experts] if value.ndim == _AXES else value for name, value in named.items()}

    def layers(self, whole: Mapping[str, Array]) -> list[AdaptedLayer]:
        """The layers with all their adapters, which are named by layer."""
        found: list[AdaptedLayer] = []
        for layer in self._layers:
            if isinstance(layer, ExpertParallelSFT):
                names = layer.lora_weights
                found.append(WholeAdapters(layer, {n: whole[f"{layer.layer_idx}.{n}"] for n in names}))
            else:
                found.append(layer)
        return found

    def any_rank(self, said: bool) -> bool:
        """Whether one of the ranks says so. Collective."""
        return said if self.ranks is None else any(self.ranks.gather_numbers([float(said)]))

    def first_says(self, said: bool) -> bool:
        """What the first rank says. Collective."""
        return said if self.ranks is None else bool(self.ranks.gather_numbers([float(said)])[0])
