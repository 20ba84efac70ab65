"""What the experts of a layer are stored in, whether anything computes with it or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .gguf.checkpoint import GgufCheckpoint
from .gguf.experts import expert_role
from .layouts.encodings import NATIVE_LAYOUTS
from .layouts.layer import ExpertLayer, read_layers
from .layouts.name_patterns import NAME_PATTERNS
from .safetensors.checkpoint import SafetensorsCheckpoint

__all__ = ["StoredLayer", "stored_gguf_layer", "stored_layer"]


class StoredLayer(NamedTuple):
    """The dtypes of each projection's weights, in small letters, and the bytes of all its experts."""

    formats: Mapping[str, str]
    num_bytes: int


def stored_layer(checkpoint: SafetensorsCheckpoint, layer_idx: int) -> StoredLayer | None:
    """Look the experts of a layer up by their names alone.

    Parameters
    ----------
    checkpoint : SafetensorsCheckpoint
    layer_idx : int

    Returns
    -------
    StoredLayer or None
        A projection whose experts differ has all their dtypes, ``bf16 f32``. None where no experts have known
        names.
    """
    for layer in read_layers(checkpoint, layer_idx):
        for tensors in _layouts():
            if all(template in layer.expert_ids for template in tensors.values()):
                return _stored(layer, tensors)
    return None


def _layouts() -> Iterator[Mapping[str, str]]:
    """The names of weights by role, in every pattern and encoding."""
    for pattern in NAME_PATTERNS:
        yield pattern.tensors
    for pattern, encoding in NATIVE_LAYOUTS:
        yield {role: stem + encoding.codes.suffix for role, stem in pattern.tensors.items()}


def _stored(layer: ExpertLayer, tensors: Mapping[str, str]) -> StoredLayer:
    formats: dict[str, str] = {}
    for role, template in tensors.items():
        dtypes = {layer.checkpoint.info(name).dtype.lower() for name in _names(layer, template)}
        formats |= dict.fromkeys(_projections(role), " ".join(sorted(dtypes)))
    stems = tuple(template.removesuffix(".weight") for template in tensors.values())
    infos = [
        layer.checkpoint.info(name)
        for template in layer.expert_ids
        if template.startswith(stems)
        for name in _names(layer, template)
    ]
    return StoredLayer(formats, sum(info.end - info.begin for info in infos))


def _names(layer: ExpertLayer, template: str) -> list[str]:
    """The tensors of a template that are there."""
    return [layer.name(template, e) for e in sorted(layer.expert_ids[template])]


def _projections(role: str) -> list[str]:
    return [f"{part}_proj" for part in (("gate", "up") if role == "gate_up" else (role,))]


def stored_gguf_layer(checkpoint: GgufCheckpoint, layer_idx: int) -> StoredLayer:
    """The like of a GGUF model. A tensor of an unknown type counts no bytes."""
    types: dict[str, set[str]] = {}
    num_bytes = 0
    for name in checkpoint.blocks.get(layer_idx, ()):
        role = expert_role(name)
        if role is not None:
            info = checkpoint.info(name)
            types.setdefault(role, set()).add(info.type)
            num_bytes += info.num_bytes
    formats = {
        projection: " ".join(sorted(types[role]))
        for role in ("gate_up", "gate", "up", "down")
        if role in types
        for projection in _projections(role)
    }
    return StoredLayer(formats, num_bytes)
