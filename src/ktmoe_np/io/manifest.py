"""``ktmoe.json``: what a directory of quantised layers was made from, how, and how exact it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._safetensors_header import parse_json_object
from .writer import replace_text

__all__ = ["LayerRecord", "Manifest", "manifest_path", "read_manifest", "write_manifest"]

_FORMAT, _VERSION = "ktmoe-quantized", 1


@dataclass(frozen=True)
class LayerRecord:
    """What is known of a layer's file."""

    sha256: str  #: of the file
    relative_error: Mapping[str, float]  #: projection -> of the weights, on `experts_checked`
    experts_checked: tuple[int, ...]


@dataclass
class Manifest:
    """What the file says."""

    source: str  #: the checkpoint, as an absolute path
    method: str
    group_size: int | None
    layers: dict[int, LayerRecord] = field(default_factory=dict)


def manifest_path(directory: str | os.PathLike[str]) -> Path:
    """The file in a directory."""
    return Path(directory) / "ktmoe.json"


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest, version: str) -> None:
    """Write the file, all at once; `version` is that of this package."""
    layers = {
        str(layer): {
            "sha256": record.sha256,
            "relative_error": dict(record.relative_error),
            "experts_checked": list(record.experts_checked),
        }
        for layer, record in sorted(manifest.layers.items())
    }
    value = {
        "format": _FORMAT,
        "version": _VERSION,
        "ktmoe_np": version,
        "source": manifest.source,
        "method": manifest.method,
        "group_size": manifest.group_size,
        "layers": layers,
    }
    replace_text(manifest_path(directory), json.dumps(value, indent=2) + "\n")


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check the file.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not such a file, or a field that is missing or of the wrong kind: names the file and the field.
    """
    path = manifest_path(directory)
    value = parse_json_object(path.read_bytes(), str(path))
    for name, expected in (("format", _FORMAT), ("version", _VERSION)):
        if value.get(name) != expected:
            raise ValueError(f"{path}: {name} is {value.get(name)!r:.80}, expected {expected!r}")
    layers = {
        _number(path, number): _record(path, f"layers.{number}", entry)
        for number, entry in _field(path, "layers", value, dict, "an object").items()
    }
    size = value.get("group_size")
    if not (size is None or type(size) is int):
        raise ValueError(f"{path}: group_size is {size!r:.80}, expected a number or null")
    source = _field(path, "source", value, str, "a string")
    return Manifest(source, _field(path, "method", value, str, "a string"), size, layers)


def _field(path: Path, name: str, value: Mapping[str, Any], kind: type, expected: str) -> Any:
    """A field of an object by the last part of its name."""
    found = value.get(name.rpartition(".")[2])
    if not isinstance(found, kind):
        raise ValueError(f"{path}: {name} is {found!r:.80}, expected {expected}")
    return found


def _number(path: Path, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"{path}: layers has {text!r:.80}, expected numbers of layers")
    return int(text)


def _record(path: Path, name: str, entry: object) -> LayerRecord:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {name} is {entry!r:.80}, expected an object")
    digest = _field(path, f"{name}.sha256", entry, str, "a string")
    errors = _field(path, f"{name}.relative_error", entry, dict, "an object")
    experts = _field(path, f"{name}.experts_checked", entry, list, "an array")
    if not all(type(error) in (int, float) for error in errors.values()):
        raise ValueError(f"{path}: {name}.relative_error is {errors!r:.80}, expected numbers")
    if not all(type(expert) is int for expert in experts):
        raise ValueError(f"{path}: {name}.experts_checked is {experts!r:.80}, expected numbers of experts")
    return LayerRecord(digest, errors, tuple(experts))
