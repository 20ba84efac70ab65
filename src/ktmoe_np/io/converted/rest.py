"""What a model needs beside the files of its quantized experts: its other tensors, its tokenizer, its config.

A copy has the tensors in one ``model.safetensors``, without those of experts. Links are to the source's own
files of tensors, experts included: hard links, or symbolic ones to another file system. Small files are
copied either way, as editors and tokenizers write theirs in place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..json_text import MAX_JSON_BYTES
from ..layouts.layer import expert_layers, read_layers
from ..mapped import MappedFiles
from ..regular_file import read_regular
from ..safetensors.checkpoint import (
    SafetensorsCheckpoint,
    SafetensorsFile,
    checkpoint_files,
    hf_config_path,
    index_path,
)
from ..safetensors.writer import replacing, write_safetensors

__all__ = [
    "Rest",
    "copy_file",
    "copy_rest",
    "is_part_of",
    "is_written_copy",
    "link_rest",
    "write_rest",
    "write_text",
]

#: The file of tensors in a copy, the first that is looked for in a directory.
_TENSORS = "model.safetensors"

#: What its metadata says: "pt" is what transformers looks for.
_MARK = {"format": "pt", "ktmoe": "all tensors but those of experts"}

#: Files of a tokenizer, and of how texts are generated.
_OTHERS = (
    "generation_config.json",
    "tokenizer*",
    "tokenization_*.py",
    "spiece.model",
    "sentencepiece.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "tiktoken.model",
)


class Rest(NamedTuple):
    """Files that were written or linked, by their names, and their bytes."""

    files: tuple[str, ...]
    num_bytes: int


def copy_rest(checkpoint: SafetensorsCheckpoint, directory: str | os.PathLike[str]) -> Rest:
    """Copy all that a model has but its experts. What is there already, and the same, stays.

    Parameters
    ----------
    checkpoint : SafetensorsCheckpoint
        The model.
    directory : str or path-like

    Raises
    ------
    FileNotFoundError
        A shard, or the config.json, is missing.
    OSError
        A file cannot be read or written.
    """
    target = Path(directory)
    tensors = {name: checkpoint.tensor(name) for name in _names(checkpoint)}
    path = target / _TENSORS
    if path.is_symlink() or any(_is_same(path, file) for file in checkpoint_files(checkpoint.path)):
        path.unlink()  # a link, which must not be written through
    if not _holds(path, tensors):
        write_safetensors(path, tensors, _MARK)
    return _rest(target, [_TENSORS, *_copy_others(checkpoint, target)])


def copy_file(file: Path, copy: Path) -> None:
    """Copy a small file, unless the copy is there; a link in its place is replaced, not written through."""
    text = read_regular(file, MAX_JSON_BYTES)
    if _is_same(copy, file) and not copy.is_symlink():
        copy.unlink()  # a hard link, which would be of the same file
    _write(copy, text)


def write_text(path: Path, text: str) -> None:
    """Write a small file, unless it is there; a link in its place is replaced, not written through."""
    _write(path, text.encode())


def write_rest(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    texts: Mapping[str, str | None],
) -> Rest:
    """Write all that a model has but its experts, from whatever files; see `copy_rest`.

    Parameters
    ----------
    directory : str or path-like
    tensors : mapping of str to array
        The dense tensors, by their names in checkpoints of transformers.
    texts : mapping of str to str
        Small files by their names; None for one that is there already.
    """
    target = Path(directory)
    path = target / _TENSORS
    if path.is_symlink():
        path.unlink()
    if not _holds(path, tensors):
        write_safetensors(path, tensors, _MARK)
    for name, text in texts.items():
        if text is not None:
            write_text(target / name, text)
    return _rest(target, [_TENSORS, *texts])


def _write(path: Path, text: bytes) -> None:
    if not path.is_symlink() and path.is_file() and path.read_bytes() == text:
        return
    if path.is_symlink():
        path.unlink()
    with replacing(path) as written:
        written.write(text)


def link_rest(checkpoint: SafetensorsCheckpoint, directory: str | os.PathLike[str]) -> Rest:
    """Link the files of a model's tensors into a directory, and copy the others; see `copy_rest`.

    Raises
    ------
    FileNotFoundError
        A shard, or the config.json, is missing.
    OSError
        A link cannot be made.
    """
    target, source = Path(directory), hf_config_path(checkpoint.path).parent
    index = index_path(checkpoint.path)
    files = checkpoint_files(checkpoint.path)
    copied = target / _TENSORS
    if is_written_copy(copied):
        copied.unlink()  # it would be found before the others
    names = [os.fspath(file.relative_to(source)) for file in files]
    for file, name in zip(files, names, strict=True):
        _link(file, target / name)
    if index is not None:
        copy_file(index, target / index.name)
        names.append(index.name)
    return _rest(target, [*names, *_copy_others(checkpoint, target)])


def is_part_of(path: Path, checkpoint: SafetensorsCheckpoint) -> bool:
    """Whether a file of a directory is one that `copy_rest` wrote, or a link to one of the checkpoint's."""
    return is_written_copy(path) or any(_is_same(path, file) for file in checkpoint_files(checkpoint.path))


def _names(checkpoint: SafetensorsCheckpoint) -> list[str]:
    """All tensors but those of experts."""
    experts: set[str] = set()
    for number in expert_layers(checkpoint):
        for layer in read_layers(checkpoint, number):
            for pattern in layer.patterns():
                for template in (*pattern.tensors.values(), *pattern.biases.values()):
                    experts.update(layer.name(template, e) for e in layer.expert_ids.get(template, ()))
    return [name for name in checkpoint.names() if name not in experts]


def _others(checkpoint: SafetensorsCheckpoint) -> list[Path]:
    """The files of the model that hold no tensors."""
    config = hf_config_path(checkpoint.path)
    found = {file for pattern in _OTHERS for file in config.parent.glob(pattern) if file.is_file()}
    return [config, *sorted(found)]


def _copy_others(checkpoint: SafetensorsCheckpoint, target: Path) -> list[str]:
    """Copy the files of the model that hold no tensors; their names."""
    others = _others(checkpoint)
    for file in others:
        copy_file(file, target / file.name)
    return [file.name for file in others]


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names are of the same file, by links or otherwise."""
    return path.exists() and other.exists() and path.samefile(other)


def is_written_copy(path: Path) -> bool:
    """Whether a file is the one of tensors that `copy_rest` or `write_rest` wrote."""
    if path.name != _TENSORS or not path.is_file():
        return False
    try:
        return SafetensorsFile(path).metadata.get("ktmoe") == _MARK["ktmoe"]
    except (OSError, ValueError):
        return False


def _holds(path: Path, tensors: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a file that `copy_rest` wrote has these tensors, to the byte."""
    if not is_written_copy(path):
        return False
    file = SafetensorsFile(path)
    if set(file.names()) != tensors.keys():
        return False
    for name, tensor in tensors.items():
        found = file.tensor(name)
        MappedFiles([found, tensor]).check()
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            return False
        if not np.array_equal(_bytes_of(found), _bytes_of(tensor)):
            return False
    return True


def _bytes_of(tensor: NDArray[Any]) -> NDArray[np.uint8]:
    return tensor.reshape(-1).view(np.uint8)


def _link(file: Path, link: Path) -> None:
    """Make a link to a file; one that is there stays, and another file goes."""
    original = file.resolve(strict=True)
    if _is_same(link, original):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        os.link(original, link)
    except OSError:  # another file system, or one without hard links
        link.symlink_to(original)


def _rest(target: Path, names: list[str]) -> Rest:
    return Rest(tuple(names), sum((target / name).stat().st_size for name in names))
