"""The rank and alpha that layers must have to hold the adapters of a directory."""

from __future__ import annotations

import os
from pathlib import Path

from ...io import SafetensorsFile
from .config import CONFIG_FILE, TENSORS_FILE, PeftConfig, read_peft_config
from .fused import without_cross_terms
from .tensors import FusedLayer, PeftTensors, peft_tensors, read_fused

__all__ = ["layer_scale", "peft_scale"]


def peft_scale(directory: str | os.PathLike[str]) -> tuple[int, float]:
    """The rank and alpha of adapters that PEFT or `export_peft` wrote: what layers must be made with.

    Of fused adapters whose gate and up have an A each, stacked, this is the rank of one of them. Of those
    that PEFT has trained as one, it is the rank of both together.

    Parameters
    ----------
    directory : str or path-like
        With ``adapter_config.json``, and ``adapter_model.safetensors`` if that has ranks or scales by module.

    Returns
    -------
    int, float

    Raises
    ------
    FileNotFoundError
        No such directory or file.
    ValueError
        Not such files, numbers that are none, or options and scales that a layer does not have: names it.
    """
    config = read_peft_config(Path(directory) / CONFIG_FILE)
    if not config.rank_pattern and not config.alpha_pattern:
        return config.rank, config.alpha
    return layer_scale(config, peft_tensors(SafetensorsFile(Path(directory) / TENSORS_FILE)))


def layer_scale(config: PeftConfig, tensors: PeftTensors) -> tuple[int, float]:
    """The rank and alpha of all experts.

    Raises
    ------
    ValueError
        Experts, or gate, up and down, of several ranks or scales.
    """
    if not config.rank_pattern and not config.alpha_pattern:
        return config.rank, config.alpha
    scales = {config.scale(_module(name)) for name in tensors.separate.values()}
    if len(scales) > 1:
        raise ValueError(
            f"{config.path}: rank_pattern, alpha_pattern: got {sorted(scales)} for modules of experts, "
            "expected one rank and alpha"
        )
    for layer in tensors.fused:
        scales.add(_fused_scale(config, layer, read_fused(tensors, layer, config)))
    if not scales:
        return config.rank, config.alpha
    rank, alpha = max(scales)
    if any(each_alpha * rank != alpha * each for each, each_alpha in scales):
        raise ValueError(
            f"{config.path}: alpha_pattern: got (rank, alpha) {sorted(scales)} of layers, expected the same "
            "alpha / rank"
        )
    return rank, alpha


def _fused_scale(config: PeftConfig, number: int, layer: FusedLayer) -> tuple[int, float]:
    """The rank and alpha of one layer: that of gate and up together, or of each if they can be parted."""
    first, down = (layer.first.rank, layer.first_alpha), (layer.down.rank, layer.down_alpha)
    if first[1] * down[0] != down[1] * first[0]:
        raise ValueError(
            f"{config.path}: alpha_pattern: got (rank, alpha) {first} of gate and up and {down} of down in "
            f"layer {number}, expected the same alpha / rank"
        )
    parts = layer.gated and first[0] == 2 * down[0]
    if parts and any(without_cross_terms(layer.first, interleaved=each) for each in (False, True)):
        return down
    return max(first, down)


def _module(name: str) -> str:
    """The module of a tensor, as PEFT's patterns see it."""
    return name.removeprefix("base_model.model.").rpartition(".lora_")[0]
