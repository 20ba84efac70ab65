"""Safetensors files and checkpoints of them, as NumPy views of the mapped files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.summary import object_summary
from ..json_text import read_json_object, shown
from ..layouts.layer_names import LayerNames
from ..mapped import FileIdentity, identity_at, map_file
from ..missing import no_such_path
from ..regular_file import open_regular
from ..shared import SharedCache
from ..tensor_error import TensorTypeError
from .header import DTYPES, MAX_HEADER_BYTES, TensorInfo, parse_header

__all__ = [
    "SafetensorsCheckpoint",
    "SafetensorsFile",
    "TensorInfo",
    "checkpoint_files",
    "hf_config_path",
    "index_path",
    "load_hf_config",
]

#: Checkpoints that are in use, by their path and the identities of all their files.
_shared: SharedCache[SafetensorsCheckpoint] = SharedCache()

#: Indexes of those, by their path and identity.
_indexes: SharedCache[_Index] = SharedCache()

_INDEX_NAME = "model.safetensors.index.json"

#: Letters that no path has.
_MAX_PATH = 4096


class SafetensorsFile:
    """One safetensors file, mapped read-only.

    Opening reads and checks the header; tensors are views, read from disk as they are touched. The mapping
    lives as long as the file object or any tensor of it.

    Parameters
    ----------
    path : str or path-like

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a safetensors file, cut off, or a header that contradicts itself; names the file and the tensor.

    Examples
    --------
    >>> import json, tempfile, pathlib
    >>> header = json.dumps({"a": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    >>> path = pathlib.Path(tempfile.mkdtemp(), "x.safetensors")
    >>> _ = path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([1, 0, 2, 0]))
    >>> SafetensorsFile(path).tensor("a")
    array([1, 2], dtype=int16)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ValueError(f"{self.path}: {size} bytes are too short for a safetensors file")
            self._map = map_file(file, self.path)
        size = len(self._map)
        length = int.from_bytes(self._map[:8], "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{self.path}: the header's length is given as {length} bytes, but the file has {size - 8} "
                f"left and the format allows {MAX_HEADER_BYTES}: not a safetensors file, or cut off"
            )
        self._start = 8 + length
        self._tensors, self.metadata = parse_header(self.path, self._map[8 : self._start], size - self._start)

    def __repr__(self) -> str:
        return object_summary(self, lambda: f"{str(self.path)!r}: {len(self._tensors)} tensors")

    @property
    def identity(self) -> FileIdentity:
        """Distinguishes the mapped file from others under its name."""
        return self._map.identity

    def names(self) -> tuple[str, ...]:
        """List the tensors, in the order of the header."""
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor; ValueError when there is none of that name."""
        info = self._tensors.get(name)
        if info is None:
            raise ValueError(f"{self.path}: no tensor {name!r}")
        return info

    def tensor(self, name: str) -> NDArray[Any]:
        """View a tensor.

        Parameters
        ----------
        name : str

        Returns
        -------
        ndarray, read-only, of the tensor's dtype (`ml_dtypes` for the small floats) and shape
            Shares the mapped file's memory. Not aligned when the file's layout is not.

        Raises
        ------
        ValueError
            No such tensor, or one of a dtype that NumPy does not have.
        OSError
            The file was cut off since it was opened.

        Notes
        -----
        Reading the tensor when the file has been cut off meanwhile ends the process; see
        `ktmoe_np.io.mapped`.
        """
        info = self.info(name)
        if info.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(
                f"{self.path}: tensor {name!r}: got dtype {info.dtype!r}, expected one of {known}"
            )
        self._map.check()
        return np.ndarray(info.shape, DTYPES[info.dtype], self._map, self._start + info.begin)


class _Shard:
    """A file of a checkpoint, opened at first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = identity_at(path)

    @cached_property
    def file(self) -> SafetensorsFile:
        file = SafetensorsFile(self.path)
        # Files of two models must not become one. A time alone does not tell: the file may have been touched,
        # and writing to it changes the shards that are mapped already just the same. What is not seen is a
        # file of the same size that got the number of one that was removed.
        if self._identity is not None and not file.identity.is_same_file(self._identity):
            raise ValueError(
                f"{self.path}: got another file than when the checkpoint was opened, expected the same; open "
                "the checkpoint again"
            )
        return file


class _Index:
    """An index that was read: which file each tensor is in."""

    def __init__(self, path: Path) -> None:
        self.identity = identity_at(path)
        self.file_of = _read_index(path)
        self.files = tuple(dict.fromkeys(self.file_of.values()))


class SafetensorsCheckpoint:
    """The tensors of one file or of a directory of files; a file is opened when one of its tensors is read.

    A directory holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards it names, or
    any ``*.safetensors`` files, looked for in this order. Without an index all headers must be read to know
    which tensors there are.

    Parameters
    ----------
    path : str or path-like
        A file or a directory.

    Raises
    ------
    FileNotFoundError
        No such path, or a directory without safetensors files.
    ValueError
        An index that is not what it should be, or a file that is not (see `SafetensorsFile`), or, when it is
        opened, one that has changed since the checkpoint was.

    Examples
    --------
    >>> SafetensorsCheckpoint("/nowhere")
    Traceback (most recent call last):
    FileNotFoundError: /nowhere: no such file or directory
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._index, files = _find_files(self.path)
        if self._index is None:
            self._shard_of = self._read_headers(files)
        else:
            shards = {name: _Shard(file) for name, file in zip(self._index.files, files, strict=True)}
            self._shard_of = {name: shards[file] for name, file in self._index.file_of.items()}

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        shards = set(self._shard_of.values())
        opened = sum("file" in vars(shard) for shard in shards)
        return f"{str(self.path)!r}: {len(self._shard_of)} tensors, {opened} of {len(shards)} files open"

    @classmethod
    def shared(cls, path: str | os.PathLike[str]) -> SafetensorsCheckpoint:
        """The checkpoint at `path`, the same one for all its users: index and headers are read once.

        When the index or any file has been replaced or written to, all are read again. Errors are those of
        the class.
        """
        where = Path(path)
        index, files = _find_files(where)
        key = (str(where.resolve()), index and index.identity, *map(identity_at, files))
        return _shared.get(key, lambda: cls(path))

    @classmethod
    def opened(cls, checkpoint: SafetensorsCheckpoint | str | os.PathLike[str]) -> SafetensorsCheckpoint:
        """A checkpoint as it is, or that of a path."""
        return checkpoint if isinstance(checkpoint, SafetensorsCheckpoint) else cls(checkpoint)

    def _read_headers(self, paths: Iterable[Path]) -> dict[str, _Shard]:
        shard_of: dict[str, _Shard] = {}
        for path in paths:
            shard = _Shard(path)
            for name in shard.file.names():
                if name in shard_of:
                    raise ValueError(f"{path}: tensor {name!r} is in {shard_of[name].path} too")
                shard_of[name] = shard
        return shard_of

    def _shard(self, name: str) -> _Shard:
        shard = self._shard_of.get(name)
        if shard is None:
            raise ValueError(f"{self.path}: no tensor {name!r}")
        return shard

    @cached_property
    def layers(self) -> LayerNames:
        """The tensors' names by layer."""
        return LayerNames(self._shard_of)

    def names(self) -> tuple[str, ...]:
        """List all tensors."""
        return tuple(self._shard_of)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self._shard_of

    def file_of(self, name: str) -> Path:
        """Return the file that holds `name`; ValueError when none does."""
        return self._shard(name).path

    def find(self, name: str) -> TensorInfo | None:
        """Return what `info` does; None when there is no tensor of that name."""
        shard = self._shard_of.get(name)
        return None if shard is None else shard.file.info(name)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor; opens its file."""
        return self._shard(name).file.info(name)

    def problem(
        self, name: str, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], origin: str = ""
    ) -> ValueError | None:
        """The error of a tensor that must have one of those dtypes and shapes; None if nothing is wrong.

        `origin` is what the message says behind shapes that were expected in place of another.
        """
        info = self.find(name)
        if info is not None and info.dtype in dtypes and info.shape in shapes:
            return None
        file = self.path if info is None else self.file_of(name)
        got = "none" if info is None else f"{info.dtype} {list(info.shape)}"
        expected = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
        if info is None or info.dtype in dtypes:
            expected += origin if info is not None else ""
            return ValueError(f"{file}: tensor {name!r}: got {got}, expected {expected}")
        return TensorTypeError(f"{file}: tensor {name!r}: got {got}, expected {expected}")

    def tensor(self, name: str) -> NDArray[Any]:
        """View a tensor; see `SafetensorsFile.tensor`. FileNotFoundError when its shard is missing."""
        return self._shard(name).file.tensor(name)


def load_hf_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the config.json of a checkpoint.

    Parameters
    ----------
    path : str or path-like
        The checkpoint's directory, or one of its files.

    Returns
    -------
    dict
        For `ktmoe_np.config.MoEConfig.from_hf_config`.

    Raises
    ------
    FileNotFoundError
        No config.json there.
    ValueError
        Not a JSON object.
    """
    if not Path(path).exists():
        raise no_such_path(path)
    return read_json_object(hf_config_path(path))


def hf_config_path(path: str | os.PathLike[str]) -> Path:
    """The config.json of the checkpoint whose directory, or one of whose files, `path` is."""
    where = Path(path)
    return (where if where.is_dir() else where.parent) / "config.json"


def checkpoint_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, missing or not; errors are those of the checkpoint."""
    return _find_files(path)[1]


def index_path(path: Path) -> Path | None:
    """The index of the checkpoint at `path`, where it counts; errors are those of the checkpoint."""
    return path / _INDEX_NAME if _find_files(path)[0] is not None else None


def _find_files(path: Path) -> tuple[_Index | None, list[Path]]:
    """The index of a checkpoint, where it counts, and the files that hold its tensors, missing or not."""
    if not path.exists():
        raise no_such_path(path)
    if not path.is_dir():
        return None, [path]
    index, single = path / _INDEX_NAME, path / "model.safetensors"
    if single.exists():
        return None, [single]
    if index.exists():
        found = _indexes.get((str(index.resolve()), identity_at(index)), lambda: _Index(index))
        return found, [path / file for file in found.files]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: no *.safetensors file and no {_INDEX_NAME}")
    return None, files


def _read_index(path: Path) -> dict[str, str]:
    """Read the shard of every tensor from an index; no file is opened."""
    weight_map = read_json_object(path, finite=True).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: weight_map: got {type(weight_map).__name__}, expected an object")
    shards: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(f"{path}: the shard of tensor {name!r}: got {shown(file)}, expected a string")
        if file not in shards:
            if not _is_inside(file):
                raise ValueError(
                    f"{path}: the shard of tensor {name!r:.80}: got {file!r:.300}, "
                    "expected a file name inside the checkpoint"
                )
            shards.add(file)
    return weight_map


def _is_inside(name: str) -> bool:
    """Whether a shard's name, which the file gives, is one of a file at or below its own directory."""
    path = Path(name)
    has_name = bool(path.parts) and len(name) < _MAX_PATH and name.isprintable()
    return has_name and not path.is_absolute() and ".." not in path.parts
