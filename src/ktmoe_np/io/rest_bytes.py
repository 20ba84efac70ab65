"""The bytes of a checkpoint's tensors that are not of experts, from its headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .converted.layer import quantized_layers
from .gguf.checkpoint import GgufCheckpoint, is_gguf
from .gguf.experts import expert_role
from .layouts.encodings import NATIVE_LAYOUTS
from .layouts.layer import read_layers
from .layouts.name_patterns import NAME_PATTERNS
from .safetensors.checkpoint import SafetensorsCheckpoint, index_path

__all__ = ["rest_bytes"]


def rest_bytes(path: str | os.PathLike[str], layers: Iterable[int]) -> int:
    """Count the bytes of a model's tensors but those of its experts.

    Parameters
    ----------
    path : str or path-like
        What `inspect_checkpoint` takes.
    layers : iterable of int
        The layers that have experts.

    Returns
    -------
    int
        0 for a directory of converted experts alone.

    Raises
    ------
    FileNotFoundError, ValueError
        See `inspect_checkpoint`.

    Examples
    --------
    >>> from ktmoe_np.models import EMBEDDED_MODEL
    >>> rest_bytes(EMBEDDED_MODEL, range(4)) > 0
    True
    """
    where = Path(path)
    if is_gguf(where):
        checkpoint = GgufCheckpoint.opened(where)
        names = [name for name in checkpoint.names() if not _is_expert_of_gguf(name)]
        return sum(checkpoint.info(name).num_bytes for name in names)
    if quantized_layers(where) and index_path(where) is None and not (where / "model.safetensors").is_file():
        return 0
    return _rest_of_safetensors(SafetensorsCheckpoint(where), layers)


def _is_expert_of_gguf(name: str) -> bool:
    """Whether a tensor is one of weights, biases or scales of experts."""
    return expert_role(name) is not None or "_exps." in name


def _rest_of_safetensors(checkpoint: SafetensorsCheckpoint, layers: Iterable[int]) -> int:
    patterns = [*NAME_PATTERNS, *(pattern for pattern, _ in NATIVE_LAYOUTS)]
    stems = tuple(stem.removesuffix(".weight") for p in patterns for stem in p.tensors.values())
    experts = {
        layer.name(template, e)
        for number in layers
        for layer in read_layers(checkpoint, number)
        for template, numbers in layer.expert_ids.items()
        if template.startswith(stems)
        for e in numbers
    }
    infos = [checkpoint.info(name) for name in checkpoint.names() if name not in experts]
    return sum(info.end - info.begin for info in infos)
