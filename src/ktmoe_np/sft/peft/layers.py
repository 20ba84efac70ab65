"""What reading and writing adapters of several layers share: the checks of the layers."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapted import AdaptedLayer
from ..adapters import shapes_of

__all__ = ["common_scale"]


def common_scale(layers: Sequence[AdaptedLayer]) -> tuple[int, float]:
    """The rank and alpha that all layers have.

    Raises
    ------
    ValueError
        No layers, two of the same number, ranks or scales that differ, or a layer without adapters.
    """
    if not layers:
        raise ValueError("layers: got none, expected one or more")
    numbers = [layer.layer_idx for layer in layers]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"layers: got layer_idx {sorted(numbers)}, expected every number once")
    scales = {(layer.options.lora_rank, layer.options.lora_alpha) for layer in layers}
    if len(scales) != 1:
        raise ValueError(f"layers: got (lora_rank, lora_alpha) {sorted(scales)}, expected the same in all")
    for layer in layers:
        shapes_of(layer)
    return scales.pop()
