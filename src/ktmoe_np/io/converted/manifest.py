"""``ktmoe.json``: what a directory of quantized layers was made from, how, and how exact it is.

Several processes may convert layers into one directory. A process that changes the file locks it, reads
what the others have written, adds to it and replaces the file; readers need no lock. The lock (`flock`) is on
a file of its own, which is never renamed or removed: a lock on ``ktmoe.json`` would go with the old file.
Whoever may write to the directory may lock it, other users too.

Some file systems have no locks. There nothing is locked, and only one process at a time may convert into a
directory: of two, one could undo what the other has recorded.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..json_text import read_json_object, shown
from ..safetensors.writer import replace_text

__all__ = ["LayerRecord", "Manifest", "begin_manifest", "manifest_path", "read_manifest", "record_layer"]

_FORMAT, _VERSION = "ktmoe-quantized", 1

#: The file that is locked.
_LOCK_NAME = ".ktmoe.lock"

#: Errors of `flock` on file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class LayerRecord:
    """The record of a layer's file."""

    sha256: str  #: of the file
    relative_error: Mapping[str, float]  #: projection -> of the weights, on `experts_checked`
    experts_checked: tuple[int, ...]


@dataclass
class Manifest:
    """The contents of the file."""

    source: str  #: the checkpoint, as an absolute path
    method: str
    group_size: int | None
    layers: dict[int, LayerRecord] = field(default_factory=dict)


def manifest_path(directory: str | os.PathLike[str]) -> Path:
    """The file in a directory."""
    return Path(directory) / "ktmoe.json"


def begin_manifest(directory: str | os.PathLike[str], manifest: Manifest, version: str) -> Manifest:
    """Write a file of no layers, or read the one that is there; `version` is that of this package.

    Returns
    -------
    Manifest
        What the file says.

    Raises
    ------
    ValueError
        It is that of a conversion of another kind, or not such a file: names the field.
    OSError
        The file or the lock cannot be written.
    """
    with _locked(directory):
        if not manifest_path(directory).exists():
            _write(directory, manifest, version)
        return _read_same(directory, manifest)


def record_layer(
    directory: str | os.PathLike[str], manifest: Manifest, layer: int, record: LayerRecord, version: str
) -> None:
    """Add a layer to the file and to `manifest`, which gets what others have recorded too.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        Those of `begin_manifest`, or the file is gone; nothing is recorded.
    """
    with _locked(directory):
        found = _read_same(directory, manifest)
        found.layers[layer] = record
        _write(directory, found, version)
    manifest.layers = found.layers


@contextmanager
def _locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Keep others from changing the file; waits while another does."""
    path = Path(directory, _LOCK_NAME)
    lock = _open_lock(path)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from error
        yield
    finally:
        os.close(lock)


def _open_lock(path: Path) -> int:
    """Open the file that is locked, of whomever it is, or create it for all."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
    except FileExistsError:
        try:
            return os.open(path, os.O_RDWR | flags)  # some network file systems lock only what may be written
        except PermissionError:
            return os.open(path, os.O_RDONLY | flags)
    with contextlib.suppress(OSError):  # some file systems have no permissions
        os.fchmod(lock, 0o666)  # the file is empty, and a lock is of use only where all can have it
    return lock


def _read_same(directory: str | os.PathLike[str], wanted: Manifest) -> Manifest:
    """The contents of the file; ValueError when it belongs to another conversion."""
    found = read_manifest(directory)
    for name in ("source", "method", "group_size"):
        got, expected = getattr(found, name), getattr(wanted, name)
        if got != expected:
            raise ValueError(
                f"{manifest_path(directory)}: {name}: got {got!r}, expected {expected!r}: another conversion "
                "is there; choose another directory"
            )
    return found


def _write(directory: str | os.PathLike[str], manifest: Manifest, version: str) -> None:
    """Write the file, all at once."""
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
    value = read_json_object(path, finite=True)
    for name, expected in (("format", _FORMAT), ("version", _VERSION)):
        if value.get(name) != expected:
            raise ValueError(f"{path}: {name}: got {shown(value.get(name))}, expected {expected!r}")
    layers = {
        _number(path, number): _record(path, f"layers.{number}", entry)
        for number, entry in _field(path, "layers", value, dict, "an object").items()
    }
    size = value.get("group_size")
    if not (size is None or type(size) is int):
        raise ValueError(f"{path}: group_size: got {shown(size)}, expected a number or null")
    source = _field(path, "source", value, str, "a string")
    return Manifest(source, _field(path, "method", value, str, "a string"), size, layers)


def _field(path: Path, name: str, value: Mapping[str, Any], kind: type, expected: str) -> Any:
    """A field of an object by the last part of its name."""
    found = value.get(name.rpartition(".")[2])
    if not isinstance(found, kind):
        raise ValueError(f"{path}: {name}: got {shown(found)}, expected {expected}")
    return found


def _number(path: Path, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and str(int(text)) == text):
        raise ValueError(f"{path}: layers: got {shown(text)}, expected numbers of layers")
    return int(text)


def _record(path: Path, name: str, entry: object) -> LayerRecord:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {name}: got {shown(entry)}, expected an object")
    digest = _field(path, f"{name}.sha256", entry, str, "a string")
    errors = _field(path, f"{name}.relative_error", entry, dict, "an object")
    experts = _field(path, f"{name}.experts_checked", entry, list, "an array")
    if not all(type(error) in (int, float) for error in errors.values()):
        raise ValueError(f"{path}: {name}.relative_error: got {shown(errors)}, expected numbers")
    if not all(type(expert) is int for expert in experts):
        raise ValueError(f"{path}: {name}.experts_checked: got {shown(experts)}, expected numbers of experts")
    return LayerRecord(digest, errors, tuple(experts))
